"""Tiny random networks for the decoding tests: small widths, logits far from ties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.composed.network import ComposedParams, Composition, Network, ValueArrays
from ivl_jax.composition import SCHEMES, SchemeInputs, compose_logits, value_forward
from ivl_jax.config import GenerationOptions
from ivl_jax.decoding.device.sampling import Sampling, row_keys
from ivl_jax.decoding.device.state import Requests
from ivl_jax.decoding.logit_bias import lay_out_bias
from ivl_jax.decoding.row_extras import lay_out_policies
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import hidden_states, logits_from_hidden
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import build_network, init_network
from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer
from ivl_jax.vocabulary.value_term import ValueTerm
from ivl_jax.weights.language_model import LanguageModel

VOCAB = 40

# Two composed logits closer than this are a near-tie: sums of other shapes round otherwise, and
# either token may win. The networks' logits spread over about ±10.
NEAR_TIE = 1e-3


def tiny_arch(*, width=32, heads=4, kv_heads=2, layers=2, rows=VOCAB, context=96, tied=False):
    return ArchConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": rows,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": tied,
            "initializer_range": 0.35,
        }
    )


def tiny_network(arch, seed, *, vocab_size=VOCAB, connection=None, layout=None, dtype="float32"):
    """(static half, parameters)."""
    network = Network(
        graphdef=build_network(arch, compute_dtype=jnp.dtype(dtype)),
        arch=arch,
        vocab_size=vocab_size,
        cache_dtype=dtype,
        scheme=None if connection is None else SCHEMES[connection],
        layout=layout,
    )
    init = jax.jit(lambda key: init_network(arch, key, param_dtype=jnp.dtype(dtype)))
    return network, init(jax.random.key(seed))


@functools.cache
def tiny_composition(
    connections=("residual",), *, value_vocab=VOCAB - 3, seed=0, base_dtype="float32", depths=1
):
    """A base of 44 output rows, 40 of them real, and value networks that know 37 tokens."""
    base, base_params = tiny_network(tiny_arch(rows=VOCAB + 4), seed, dtype=base_dtype)
    decoder = tiny_arch(width=16, heads=2, kv_heads=1, layers=depths, rows=value_vocab + 1)
    decoder = dataclasses.replace(decoder, head_depths=depths)
    values = []
    for i, connection in enumerate(connections):
        arch = LinearMapConfig(value_vocab, rank=6) if connection == "linear" else decoder
        if connection == "hidden":
            arch = dataclasses.replace(decoder, base_hidden_size=base.arch.hidden_size)
        network, value_params = tiny_network(
            arch, seed + 100 + i, vocab_size=value_vocab, connection=connection
        )
        if connection == "linear":  # a fresh one adds nothing
            head = jax.random.normal(jax.random.key(seed), value_params["lm_head"]["kernel"].shape)
            value_params["lm_head"] = {"kernel": head}
        if connection == "hidden":  # likewise
            shape = value_params["base_projection"]["kernel"].shape
            projection = 0.2 * jax.random.normal(jax.random.key(seed + 1), shape)
            value_params["base_projection"] = {"kernel": projection}
        if "depths" in value_params:  # likewise
            value_params["depths"] = jax.tree.map(
                lambda leaf: 0.2 * jax.random.normal(jax.random.key(leaf.ndim), leaf.shape),
                value_params["depths"],
            )
        values.append((network, value_params))
    composition = Composition(base, tuple(network for network, _ in values))
    unknown = jnp.asarray([7], jnp.int32)
    params = ComposedParams(
        base_params, tuple(ValueArrays(params, unknown) for _, params in values)
    )
    return composition, params


def make_requests(
    prompts,
    *,
    new_tokens,
    stop_ids=(),
    strengths=(1.0,),
    temperature=0.0,
    top_k=0,
    seed=0,
    rows=None,
    width=None,
    biases=(),
    policies=(),
):
    """(prompts [B P], Requests); the right padding is a token that means something."""
    count = len(prompts)
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    padded = np.full((count, width or lengths.max()), 3, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt

    def column(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (count,)))

    ends = np.full((count, 8), -1, np.int32)
    ends[:, : len(stop_ids)] = stop_ids
    requests = Requests(
        prompt_lengths=jnp.asarray(lengths),
        limits=jnp.asarray(lengths + np.asarray(new_tokens, np.int32)),
        stop_ids=jnp.asarray(ends),
        strengths=jnp.asarray(
            np.broadcast_to(np.asarray(strengths, np.float32), (count, len(strengths)))
        ),
        keys=row_keys(
            column(seed, np.int32), column(np.arange(count) if rows is None else rows, np.int32)
        ),
        sampling=Sampling(
            column(temperature, np.float32),
            column(top_k, np.int32),
            column(1.0, np.float32),
            column(0.0, np.float32),
            bias_of(*biases),
        ),
        policies=policies_of(*policies),
    )
    return jnp.asarray(padded), requests


def bias_of(*rows):
    """What each row adds to its logits, {id: number} each; None where there are none."""
    return lay_out_bias([GenerationOptions(logit_bias=row) for row in rows], rows=len(rows))


def policies_of(*rows):
    """The strength policy of each row, None where it has constant strengths."""
    options = [GenerationOptions(policy=row) for row in rows]
    return lay_out_policies(options, rows=len(rows))


def policy_share(policy, base, composed):
    """How much of the strengths applies, from logits [… V], plainly and in float64."""
    real = np.isfinite(base)

    def log_p(logits):
        logits = np.where(real, logits, -np.inf).astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def mean(p, of):
        return np.sum(np.where(real, np.exp(p) * np.where(real, of, 0.0), 0.0), axis=-1)

    before, after = log_p(base), log_p(composed)
    if policy.name == "entropy":
        uncertainty = -mean(before, before)
        return uncertainty / (uncertainty + policy.scale)
    with np.errstate(invalid="ignore"):
        change = mean(after, after - before)
    return policy.scale / (policy.scale + change)


def policy_logits(composition, params, tokens, strengths, policy):
    """Composed logits [T V] of one whole text under a strength policy."""
    full = plain_logits(composition, params, tokens, strengths)
    if policy is None:
        return full
    base = plain_logits(composition, params, tokens, [0.0] * len(strengths))
    share = policy_share(policy, base, full)[:, None]
    change = np.where(np.isfinite(base), full, 0.0) - np.where(np.isfinite(base), base, 0.0)
    return base + share * change


@functools.partial(jax.jit, static_argnums=0)
def _plain_logits(composition, params, tokens, strengths):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    base = composition.base
    base_hidden, _ = hidden_states(base.graphdef, params.base, tokens, positions=positions)
    base_logits = logits_from_hidden(base.graphdef, params.base, base_hidden)
    terms = []
    for index, network in enumerate(composition.values):
        value_params, unknown, _ = params.values[index]
        readable = jnp.where(
            (tokens >= network.vocab_size) | jnp.isin(tokens, unknown),
            network.replacement_id,
            tokens,
        )
        logits, _ = value_forward(
            network.connection,
            network.graphdef,
            value_params,
            SchemeInputs(readable, base_logits, base_hidden, base.vocab_size),
            positions=positions,
        )
        strength = strengths[index][None]
        terms.append(ValueTerm(logits, strength, network.vocab_size, unknown))
    return compose_logits(base_logits, terms, vocab_size=base.vocab_size)[0]


def plain_logits(composition, params, tokens, strengths):
    """Composed logits [T V] of one whole text, without any cache."""
    alphas = jnp.asarray(strengths, jnp.float32)
    # What follows a token changes nothing before it; one length compiles once.
    padded = np.zeros((1, 64 * -(-len(tokens) // 64)), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = _plain_logits(composition, params, jnp.asarray(padded), alphas)
    return np.asarray(logits)[: len(tokens)]


def assert_is_teacher_forced_arg_max(composition, params, prompt, generated, strengths):
    """Each generated token is the arg-max of the plain logits of all before it, near-ties apart."""
    logits = plain_logits(composition, params, [*prompt, *generated], strengths)
    for index, token in enumerate(generated):
        row = logits[len(prompt) - 1 + index]
        assert row.max() - row[token] < NEAR_TIE, (index, token, int(row.argmax()))


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=length).tolist() for length in lengths]


@functools.cache
def language_model(folder, *, seed, context=192, width=32, padding=3):
    """A random model with a real tokenizer; `padding` output rows are not tokens."""
    tokenizer = load_tokenizer(folder)
    info = describe_tokenizer(tokenizer)
    arch = tiny_arch(
        width=width, heads=2, kv_heads=1, layers=1, rows=info.vocab_size, context=context
    )
    params = jax.jit(lambda key: init_network(arch, key))(jax.random.key(seed))
    # What the padding rows hold must not matter: make it loud.
    params = {
        **params,
        "embed_tokens": {"embedding": pad_rows(params["embed_tokens"]["embedding"], padding)},
        "lm_head": {"kernel": pad_rows(params["lm_head"]["kernel"].T, padding).T},
    }
    arch = dataclasses.replace(arch, vocab_size=info.vocab_size + padding)
    return LanguageModel(str(folder), arch, params, tokenizer, info, info.eos_ids)


def pad_rows(rows, more):
    """A table with more rows, which are large."""
    return jnp.concatenate([rows, 9 * jnp.ones((more, rows.shape[1]), rows.dtype)])
