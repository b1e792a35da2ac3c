"""A linear map on logits: its definition, its start at nothing, and bases of other widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composition import SCHEMES, SchemeInputs, value_forward
from ivl_jax.model.decoder import logits_from_hidden
from ivl_jax.model.linear_map import (
    LinearMapConfig,
    abstract_linear_map,
    build_linear_map,
    init_linear_map,
    linear_map_hidden,
)
from ivl_jax.model.network import architecture_from_json, architecture_to_json

REAL, ROWS = 10, 16
LOGITS = jax.random.normal(jax.random.key(0), (2, 3, ROWS))


def filled(rank, vocab_rows=ROWS):
    arch = LinearMapConfig(REAL, rank)
    params = init_linear_map(arch, jax.random.key(1), vocab_rows=vocab_rows)
    head = params["lm_head"]["kernel"]
    random = jax.random.normal(jax.random.key(2), head.shape)
    return arch, params | {"lm_head": {"kernel": random}}


def value_logits(arch, params, base_logits=LOGITS):
    tokens = jnp.zeros(base_logits.shape[:2], jnp.int32)
    logits, cache = value_forward(
        SCHEMES["linear"],
        build_linear_map(arch),
        params,
        SchemeInputs(tokens, base_logits, vocab_size=REAL),
        positions=tokens,
    )
    assert cache is None
    return logits


@pytest.mark.parametrize("rank", [0, 4])
def test_it_is_a_matrix_product_over_real_columns_alone(rank):
    arch, params = filled(rank)
    matrix = params["lm_head"]["kernel"]
    if rank:
        matrix = params["down_proj"]["kernel"] @ matrix
    expected = LOGITS[..., :REAL] @ matrix[:REAL]
    np.testing.assert_allclose(value_logits(arch, params), expected, rtol=1e-5, atol=1e-5)
    nonsense = LOGITS.at[..., REAL:].set(jnp.nan)
    np.testing.assert_array_equal(value_logits(arch, params, nonsense), value_logits(arch, params))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("width", [12, 24])
def test_a_base_with_other_padding_gives_the_same(rank, width):
    arch, params = filled(rank)
    other = jnp.pad(LOGITS[..., :REAL], ((0, 0), (0, 0), (0, width - REAL)), constant_values=7.0)
    np.testing.assert_allclose(
        value_logits(arch, params, other), value_logits(arch, params), rtol=1e-6
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_it_starts_as_nothing_and_its_rows_do_not_depend_on_padding(rank):
    arch = LinearMapConfig(REAL, rank)
    params = init_linear_map(arch, jax.random.key(1), vocab_rows=ROWS)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(
        lambda leaf: leaf.shape, abstract_linear_map(arch, vocab_rows=ROWS)
    )
    hidden = linear_map_hidden(build_linear_map(arch), params, LOGITS)
    assert hidden.shape == (2, 3, rank or ROWS)
    np.testing.assert_array_equal(logits_from_hidden(build_linear_map(arch), params, hidden), 0.0)
    if rank:
        unpadded = init_linear_map(arch, jax.random.key(1))["down_proj"]["kernel"]
        np.testing.assert_array_equal(params["down_proj"]["kernel"][:REAL], unpadded)
        np.testing.assert_array_equal(params["down_proj"]["kernel"][REAL:], 0.0)


def test_its_record_is_read_back_and_a_wrong_one_is_refused():
    arch = LinearMapConfig(REAL, 3)
    record = architecture_to_json(arch)
    assert architecture_from_json(record) == arch
    with pytest.raises(ValueError, match="rank = 10"):
        architecture_from_json(record | {"rank": 10})
    with pytest.raises(ValueError, match="integers"):
        architecture_from_json(record | {"rank": 2.5})
    with pytest.raises(ValueError, match="integers"):
        architecture_from_json(record | {"layers": 1})
