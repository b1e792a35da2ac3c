import functools
import re

import jax
import numpy as np
import pytest

from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.sharding import LAYOUTS, bytes_per_device, make_mesh
from tests.decoding.conftest import make_value
from tests.decoding.tiny import make_requests, tiny_arch

PROMPTS = ["Once upon a time", "", "The big dog ran to the park and it was"]
GREEDY = GenerationOptions(max_new_tokens=24)
# More prompts than rows; where some of them wait, rows are refilled on every layout.
RAGGED = [GenerationOptions(max_new_tokens=tokens) for tokens in (24, 5, 12, 1, 18, 9, 14, 3, 7)]


@pytest.fixture(scope="module")
def value(stories):
    arch = tiny_arch(width=64, heads=8, kv_heads=4, rows=512, context=512)
    return make_value(stories, arch=arch)


@pytest.fixture(scope="module")
def expected(stories, value):
    return compose(stories, value, strengths=[0.3]).generate(PROMPTS, GREEDY)


def total_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def cache_bytes(model):
    """For base and value: bytes of the cache on each device, and in all; 8 rows × 64 slots."""
    padded, requests = make_requests([[1, 2]] * 8, new_tokens=3, strengths=model.strengths)
    state = model.programs.prefill(model.params, padded, requests, capacity=64)
    state = model.programs.decode_chunk(model.params, state, np.int32(2), np.zeros(8, bool))
    caches = (state.caches.base, state.caches.values[0])
    return [(set(bytes_per_device(cache).values()), total_bytes(cache)) for cache in caches]


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# Shares of base and value that a device holds: of the parameters, and of the caches. Norm scales
# stay whole. tensor = 8 divides neither the 4 kv heads nor stories260k's MLP width of 172: each
# device then holds one head of half of the rows.
@pytest.mark.parametrize(
    ("mesh", "layouts", "parameter_shares", "cache_shares"),
    [
        _slow({"data": 8}, ("full", "full"), (1, 1), (1 / 8, 1 / 8)),
        _slow({"fsdp": 8}, ("full", "full"), (1 / 8, 1 / 8), (1 / 8, 1 / 8)),
        _slow({"tensor": 8}, ("full", "full"), (0.68, 0.178), (1 / 8, 1 / 8)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("full", "full"), (1 / 4, 1 / 4), (1 / 8, 1 / 8)),
        _slow({"fsdp": 2, "tensor": 4}, ("full", "replicated"), (1 / 8, 1), (1 / 8, 1 / 2)),
    ],
    ids=str,
)
def test_every_layout_gives_the_single_device_text_and_holds_its_share(
    stories, value, expected, mesh, layouts, parameter_shares, cache_shares
):
    rules = [LAYOUTS[name] for name in layouts]
    model = compose(
        stories,
        value,
        strengths=[0.3],
        mesh=make_mesh(**mesh),
        base_rules=rules[0],
        value_rules=rules[1],
    )
    assert model.generate(PROMPTS, GREEDY) == expected
    for (per_device, total), share in zip(cache_bytes(model), cache_shares, strict=True):
        assert per_device == {total * share}
    networks = (model.params.base, model.params.values[0].params)
    for params, share in zip(networks, parameter_shares, strict=True):
        held = set(bytes_per_device(params).values())
        assert max(held) == pytest.approx(total_bytes(params) * share, rel=0.03)


def test_rows_of_a_mesh_are_refilled_where_they_are(stories, value):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = compose(stories, value, strengths=[0.3], mesh=mesh)
    prompts = [PROMPTS[index % 3] for index in range(len(RAGGED))]
    alone = compose(stories, value, strengths=[0.3]).generate(prompts, RAGGED, batch_size=3)
    assert sharded.generate(prompts, RAGGED, batch_size=4) == alone
    # What is read anew goes to the devices that hold its rows; no cache of 64 slots ever moves.
    asked = [make_requests([[1, 2]] * 4, new_tokens=3, strengths=(0.3,), width=16)] * 2
    programs, params = sharded.programs, sharded.params
    state = programs.prefill(params, *asked[0], capacity=64)
    admitted = programs.prefill(params, *asked[1], capacity=17)
    lowered = programs.place.lower(state, admitted, np.arange(4, dtype=np.int32))
    moved = re.findall(r"= f32\[([\d,]+)\]\S* all-(?:gather|to-all)\(", lowered.compile().as_text())
    assert any(shape.split(",")[2] == "17" for shape in moved if shape.count(",") == 3)
    assert not any(shape.split(",")[2] == "64" for shape in moved if shape.count(",") == 3)


@pytest.mark.slow
def test_a_draft_on_a_mesh_is_sharded_like_the_values_and_changes_no_text(stories, value, expected):
    model = compose(
        stories,
        value,
        strengths=[0.3],
        mesh=make_mesh(data=2, fsdp=2, tensor=2),
        draft=stories,
        draft_length=2,
    )
    texts = model.generate(PROMPTS, GREEDY)
    assert texts == expected
    assert all(text.accepted_tokens > 10 for text in texts)
    held = set(bytes_per_device(model.params.draft).values())
    assert max(held) == pytest.approx(total_bytes(model.params.draft) / 4, rel=0.03)
