"""Tiny models and batches that the training tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.composed.network import Composition, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.data.batching import Batch
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import build_decoder, init_params
from ivl_jax.training.loss import Loss

VOCAB = 61
VOCAB_ROWS = 64


def make_arch(**overrides) -> ArchConfig:
    fields = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }
    return ArchConfig.from_hf(fields | overrides)


def make_params(arch, seed, **overrides):
    make = functools.partial(init_params, arch, vocab_rows=VOCAB_ROWS, **overrides)
    return jax.jit(make)(jax.random.key(seed))


def make_batch(seed=0, *, rows=8, length=12) -> Batch:
    """Two packed segments a row, padding at the end, uneven loss masks; pad id equals eos id 2."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        first = int(rng.integers(2, length // 2))
        last = int(rng.integers(first + 2, length + 1))
        segments[row, :first], segments[row, first:last] = 1, 2
        positions[row, :first] = np.arange(first)
        positions[row, first:last] = np.arange(last - first)
    tokens = rng.integers(3, VOCAB, (rows, length)).astype(np.int32)
    tokens[segments == 0] = 2
    targets = np.roll(tokens, -1, axis=1)
    share = rng.random((rows, 1))
    loss_mask = (rng.random((rows, length)) < share) & (segments > 0)
    return Batch(tokens, targets, loss_mask, positions, segments)


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def make_loss(
    arch,
    *,
    alone=False,
    connection="residual",
    value_vocab_size=VOCAB,
    layout=None,
    base_layout=None,
    compute_dtype=jnp.float32,
    **overrides,
) -> Loss:
    graphdef = build_decoder(arch, compute_dtype=compute_dtype)
    if alone:
        return Loss(Composition(Network(graphdef, arch, VOCAB, layout=layout)), **overrides)
    base = Network(graphdef, arch, VOCAB, layout=base_layout)
    value = Network(graphdef, arch, value_vocab_size, scheme=SCHEMES[connection], layout=layout)
    penalty = {"penalty_kind": "l1", "penalty_weight": 0.7}
    return Loss(Composition(base, (value,)), **(penalty | overrides))
