"""The decoder as pure functions over (graphdef, params): tokens in, fp32 logits out.

In: an `ArchConfig`; then a static graphdef, a nested dict of arrays, tokens and positions. Out:
hidden states, logits and the next cache. Base model and value network are two calls of these.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Key

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import (
    Params,
    abstract_params,
    assemble,
    parameter_declarations,
    static_attribute,
)
from ivl_jax.model.attention.form import PLAIN, AttentionForm
from ivl_jax.model.attention.plain import soft_cap
from ivl_jax.model.kv_cache import KVCache
from ivl_jax.model.layer_stack import run_layers
from ivl_jax.model.layers import Constrain, Decoder
from ivl_jax.model.parameter import static_half
from ivl_jax.model.product import multiply
from ivl_jax.model.projection import AS_TRAINED, KernelForm, project
from ivl_jax.model.remat import Remat

ADDITIONS = ("base_projection", "depths")
"""Modules that only value networks have; as zeros they change nothing."""


@functools.cache
def build_decoder(
    arch: ArchConfig,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = False,
    form: KernelForm = AS_TRAINED,
    attention: AttentionForm = PLAIN,
    all_depths: bool = False,
) -> nnx.GraphDef:
    """The static half of a decoder: hashable, made once per argument set, free of arrays.

    Args:
        arch: The architecture.
        compute_dtype: Of activations and matmuls; norms, softmax and logits are always fp32.
        remat: Which of a layer's activations are computed again in the backward pass
            (`ivl_jax.model.remat`). On CPU this saves memory only together with `scan_layers`: XLA
            merges the unrolled forms.
        scan_layers: Run the layers as one `lax.scan`; params then hold them stacked
            (`stack_layers`) and so does the cache.
        form: How kernels are stored.
        attention: How attention without a cache is computed (`attention.form.choose_form`).
        all_depths: `hidden_states` also returns what the head could read of each depth.

    Returns:
        The graphdef every function of this module takes beside params.
    """
    return static_half(
        Decoder(
            arch,
            compute_dtype=compute_dtype,
            remat=remat,
            scan_layers=scan_layers,
            form=form,
            attention=attention,
            all_depths=all_depths,
            vocab_rows=arch.vocab_size,
        )
    )


def init_params(
    arch: ArchConfig,
    key: Key[Array, ""],
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    scan_layers: bool = False,
) -> Params:
    """Fresh parameters: normal kernels and embeddings, zero biases, norms that do nothing.

    Args:
        arch: The architecture; its `initializer_range` is the standard deviation.
        key: A typed PRNG key; equal keys give equal parameters whatever `scan_layers`,
            `base_hidden_size` and `head_depths` are.
        param_dtype: See `abstract_params`, as for the rest.
        vocab_rows: Rows of embedding and head.
        scan_layers: Stack the layers.

    Returns:
        Arrays in the shapes of `abstract_params`; the `ADDITIONS` are zero.
    """
    shapes = abstract_params(arch.plain, param_dtype=param_dtype, vocab_rows=vocab_rows)
    declared = parameter_declarations(arch.plain)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct, key: Key[Array, ""]) -> Array:
        initial = declared[tuple(part.key for part in path)].initial
        if initial == "normal":
            return arch.initializer_range * jax.random.normal(key, leaf.shape, leaf.dtype)
        return jnp.full(leaf.shape, 0.0 if initial == "zeros" else 1.0, leaf.dtype)

    keys = jax.random.split(key, len(leaves))
    filled = [fill(path, leaf, keys[index]) for index, (path, leaf) in enumerate(leaves)]
    params = jax.tree.unflatten(structure, filled) | zero_additions(arch, param_dtype)
    return stack_layers(params) if scan_layers else params


def zero_additions(arch: ArchConfig, param_dtype: DTypeLike) -> Params:
    """What a value network has beside a published model's parameters, all zero.

    Args:
        arch: The architecture; if it is `plain`, there is nothing to add.
        param_dtype: Dtype the parameters are stored in.

    Returns:
        Those of the `ADDITIONS` that it has. Beside the parameters of `arch.plain` they change
        nothing: the network reads only text, and its head the last layer alone.
    """
    if arch == arch.plain:
        return {}
    shapes = abstract_params(arch, param_dtype=param_dtype)
    shapes = {name: shapes[name] for name in ADDITIONS if name in shapes}
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def stack_layers(params: Params) -> Params:
    """Layers `{0: …, 1: …}` as one subtree whose arrays have a leading layer axis."""
    layers = [params["layers"][index] for index in sorted(params["layers"])]
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {
        index: jax.tree.map(lambda leaf, at=index: leaf[at], params["layers"])
        for index in range(depth)
    }
    return params | {"layers": layers}


def untie_head(params: Params) -> Params:
    """Adds `lm_head.kernel`, the transposed embedding, where there is none; logits stay."""
    if "lm_head" in params:
        return params
    return params | {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}


def zero_head(params: Params) -> Params:
    """A decoder whose logits are all zero: its head, untied first where tied, set to zero."""
    untied = untie_head(params)
    return untied | {"lm_head": {"kernel": jnp.zeros_like(untied["lm_head"]["kernel"])}}


def embed(
    graphdef: nnx.GraphDef, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Token embeddings in the compute dtype, scaled where the family scales them.

    A token outside the embedding's rows gives NaN, never another token's row.
    """
    return _embed(assemble(graphdef, params), tokens)


def embed_probabilities(
    graphdef: nnx.GraphDef, params: Params, probabilities: Float[Array, "B T V"]
) -> Float[Array, "B T D"]:
    """The expected token embedding under a distribution over tokens, scaled like `embed`.

    Args:
        graphdef: From `build_decoder`.
        params: Nested dict of arrays.
        probabilities: fp32; columns beyond the embedding's rows have no embedding and count as 0.

    Returns:
        Embeddings in the compute dtype.
    """
    decoder = assemble(graphdef, params)
    rows = decoder.embed_tokens.embedding[...]
    width = min(rows.shape[0], probabilities.shape[-1])
    weights = probabilities[..., :width].astype(decoder.compute_dtype)
    mixed = multiply("btv,vd->btd", weights, rows[:width], dtype=decoder.compute_dtype)
    return _scale_embeddings(decoder, mixed)


def project_base_hidden(
    graphdef: nnx.GraphDef, params: Params, base_hidden: Float[Array, "B T Db"]
) -> Float[Array, "B T D"]:
    """A base's final hidden states as input embeddings of this network, scaled like `embed`.

    Args:
        graphdef: From `build_decoder`, of an architecture with a `base_hidden_size`.
        params: Nested dict of arrays.
        base_hidden: The base's hidden states after its final norm.

    Returns:
        Embeddings in the compute dtype, to be added to or to take the place of those of tokens.

    Raises:
        ValueError: The architecture reads no hidden states, or those of a base of another width.
    """
    decoder = assemble(graphdef, params)
    expected, found = decoder.arch.base_hidden_size, base_hidden.shape[-1]
    if not expected or expected != found:
        raise ValueError(
            f"base_hidden_size: this network reads hidden states of a base of width "
            f"{expected or 'none'}, got {found}; use a base of that width"
        )
    projected = decoder.base_projection(base_hidden.astype(decoder.compute_dtype))
    return _scale_embeddings(decoder, projected)


def hidden_states(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"] | None,
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
    input_embeddings: Float[Array, "B T D"] | None = None,
    constrain: Constrain | None = None,
) -> tuple[Float[Array, "B T _"], KVCache | None]:
    """Runs the decoder up to its final norm, or to the mixture of depths that its head reads.

    Without a cache, query t sees key s iff s ≤ t, both have the same segment id, and s is inside
    the layer's window. With one, keys and values are written at slot = position first, and a query
    at position p sees slots s ≤ p (and p − s < window): what lies beyond a row's length is masked
    until it is overwritten, so ragged right-padded prompts need no mask, and a smaller next
    position rolls the row back. A call with the first tokens of the rows
    attends as one without a cache: over its own tokens, not over the capacity.

    Args:
        graphdef: From `build_decoder`.
        params: Nested dict of arrays; layers stacked iff the graphdef was built with `scan_layers`.
        tokens: Token ids; None when `input_embeddings` are given.
        positions: Position of each token in its own sequence; with a cache, also its slot.
        segment_ids: 0 padding, 1.. sequences packed in a row; None: one sequence. Not with a cache.
        cache: What earlier calls remembered; None: nothing is remembered.
        prompt_lengths: Real tokens of each row, where these are its first: at the positions 0, 1,
            …, then padding; what the cache held is not read. None: the rows continue.
        input_embeddings: Take the place of `embed(tokens)`; already scaled.
        constrain: Called with activations and their logical axes; adds sharding constraints.

    Returns:
        Hidden states [B T D] for the head, in the compute dtype, and the new cache (None without).
        With `all_depths`, [B T K·D]: those, then what the head could read of each layer before the
        last, shallowest first.

    Raises:
        ValueError: Both or neither of tokens and embeddings, or segment ids beside a cache.
    """
    if (tokens is None) == (input_embeddings is None):
        raise ValueError("hidden_states takes either tokens or input_embeddings, and not both")
    if cache is not None and segment_ids is not None:
        raise ValueError(
            "hidden_states: segment_ids have no meaning with a cache (one row, one text)"
        )
    decoder = assemble(graphdef, params)
    constrain = _unconstrained if constrain is None else constrain
    x = input_embeddings if tokens is None else _embed(decoder, tokens)
    assert x is not None
    x = constrain(x.astype(decoder.compute_dtype), ("batch", "length", "embed"))
    x, late, cache = run_layers(
        decoder,
        x,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        prompt_lengths=prompt_lengths,
        constrain=constrain,
        late=decoder.arch.head_depths - 1,
    )
    hidden = decoder.norm(x)
    if late:
        hidden, normed = decoder.depths(hidden, late, decoder.norm)
        if decoder.all_depths:
            hidden = jnp.concatenate([hidden, *normed], axis=-1)
    return hidden, cache


def logits_from_hidden(
    graphdef: nnx.GraphDef, params: Params, hidden: Float[Array, "B T D"]
) -> Float32[Array, "B T V"]:
    """Logits of final hidden states, soft cap included.

    `lm_head.kernel` is used wherever params hold one, also for a tied architecture: a transposed
    copy of the embedding reads 15 times faster on CPU at T = 1.

    Args:
        graphdef: From `build_decoder`, or of any network with a head (`network.build_network`).
        params: Nested dict of arrays; only the head is read, so that alone will do.
        hidden: Hidden states after the final norm.

    Returns:
        Logits in fp32, one column a row of the head.
    """
    arch, dtype = static_attribute(graphdef, "arch"), static_attribute(graphdef, "compute_dtype")
    rows, hidden = static_attribute(graphdef, "form").rows, hidden.astype(dtype)
    if "lm_head" in params:
        head = params["lm_head"]
        logits = project(hidden, head["kernel"], head.get("scale"), rows=rows, dtype=jnp.float32)
    else:
        embedding = params["embed_tokens"]["embedding"]
        if rows:
            logits = project(hidden, embedding, rows=True, dtype=jnp.float32)
        else:
            logits = multiply("btd,vd->btv", hidden, embedding, dtype=jnp.float32)
    return soft_cap(logits, arch.final_logit_softcapping)


def forward(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float32[Array, "B T V"]:
    """Logits of whole sequences, without a cache; see `hidden_states` for who sees whom."""
    hidden, _ = hidden_states(
        graphdef, params, tokens, positions=positions, segment_ids=segment_ids
    )
    return logits_from_hidden(graphdef, params, hidden)


def _unconstrained(x: Array, axes: tuple[str, ...]) -> Array:
    del axes
    return x


def _embed(decoder: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    dtype = decoder.compute_dtype
    rows = decoder.embed_tokens.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan)
    return _scale_embeddings(decoder, rows.astype(dtype))


def _scale_embeddings(decoder: Decoder, rows: Array) -> Array:
    if not decoder.arch.scale_embeddings:
        return rows
    # Gemma rounds the factor to the compute dtype (55.4256 to 55.5 in bf16), and so do its weights.
    return rows * jnp.asarray(decoder.arch.hidden_size**0.5, rows.dtype)
