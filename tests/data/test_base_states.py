"""Cached states: exact, laid out like tokens, resumed, and refused when stale or damaged."""

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.data import base_states
from ivl_jax.data.base_states import StatesError, open_base_states
from ivl_jax.data.batching import lay_out_rows

POSITIONS = np.asarray([3, 5, 2, 4, 7, 1])
IDENTITY = {"base weights": "a" * 64, "data.max_length": 8}


@pytest.fixture
def small_files(monkeypatch):
    """Two or three dialogues a file."""
    monkeypatch.setattr(base_states, "_SHARD_BYTES", 8 * 4 * 4)


def open_states(folder, **changes):
    settings = {"identity": IDENTITY, "positions": POSITIONS, "width": 4, "dtype": "float32"}
    return open_base_states(folder, **(settings | changes))


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 4)).astype(jnp.dtype(dtype)) for n in POSITIONS]


def write_all(states, made):
    for shard in states.missing():
        first, end = states.shards[shard]
        states.write(shard, made[first:end])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_come_back_bit_for_bit_where_their_tokens_are(tmp_path, small_files, dtype):
    made = arrays(dtype)
    states = open_states(tmp_path / "states", dtype=dtype)
    assert len(states.shards) > 1 or dtype == "bfloat16"
    assert states.total_bytes == sum(array.nbytes for array in made)
    write_all(states, made)
    rows = [[4, 5], [], [2, 0]]
    batch = open_states(tmp_path / "states", dtype=dtype).lay_out(rows, row_length=8)
    assert batch.dtype == jnp.dtype(dtype)
    tokens = lay_out_rows(
        [
            [(np.ones(POSITIONS[i] + 1, np.int32), np.ones(POSITIONS[i] + 1, bool)) for i in row]
            for row in rows
        ],
        sequence_length=8,
        pad_id=0,
    )
    assert tokens.token_mask.tolist() == (np.abs(batch.astype(np.float32)).sum(-1) > 0).tolist()
    np.testing.assert_array_equal(batch[0, :7], made[4])
    np.testing.assert_array_equal(batch[0, 7:], made[5])
    np.testing.assert_array_equal(batch[2, 2:5], made[0])


def test_a_stopped_pass_resumes_with_what_is_missing(tmp_path, small_files):
    made, states = arrays(), open_states(tmp_path / "states")
    first, end = states.shards[1]
    states.write(1, made[first:end])
    (tmp_path / "states" / "00000.abc.unfinished").write_bytes(b"half")
    again = open_states(tmp_path / "states")
    assert again.missing() == [shard for shard in range(len(states.shards)) if shard != 1]
    with pytest.raises(StatesError, match="delete the folder"):
        again.lay_out([[0]], row_length=8)
    write_all(again, made)
    assert again.missing() == []
    assert not list((tmp_path / "states").glob("*.unfinished"))
    np.testing.assert_array_equal(again.lay_out([[3]], row_length=4)[0], made[3])


def test_stale_states_are_refused_with_every_difference(tmp_path):
    write_all(open_states(tmp_path / "states"), arrays())
    changed = {"base weights": "b" * 64, "data.max_length": 16}
    with pytest.raises(StatesError) as error:
        open_states(tmp_path / "states", identity=changed, dtype="bfloat16")
    for part in (
        "base weights: aaaaaaaaaaaa in the cache, bbbbbbbbbbbb in this run",
        "data.max_length: 8 in the cache, 16 in this run",
        "dtype: 'float32' in the cache, 'bfloat16' in this run",
        "Delete the folder",
    ):
        assert part in str(error.value)
    with pytest.raises(StatesError, match="local"):
        open_states("gs://bucket/states")


def test_one_altered_bit_is_named(tmp_path):
    states = open_states(tmp_path / "states")
    write_all(states, arrays())
    (file,) = (tmp_path / "states").glob("*.arrayrecord")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StatesError, match=r"states.*cannot be read.*delete the folder"):
        open_states(tmp_path / "states").lay_out([list(range(6))], row_length=32)


def test_other_shapes_than_announced_are_refused(tmp_path):
    states, made = open_states(tmp_path / "states"), arrays()
    with pytest.raises(ValueError, match=r"dialogue 1: expected float32\[5, 4\], got .*\[3, 4\]"):
        states.write(0, [made[0], made[0], *made[2:]])
    with pytest.raises(ValueError, match="float64"):
        states.write(0, [array.astype(np.float64) for array in made])
    assert states.missing() == [0]
