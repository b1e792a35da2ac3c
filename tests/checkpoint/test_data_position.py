"""Positions of several processes are read back by as many, or by others if all are alike."""

import pytest
from etils import epath

from ivl_jax.checkpoint.data_position import pack_data_states, unpack_data_state

FOLDER = epath.Path("run/checkpoints/7")


@pytest.mark.parametrize("position", [{"next_index": 7}, b"\x00seven", None])
def test_a_position_comes_back(position):
    assert unpack_data_state(pack_data_states(position), FOLDER) == position


def test_what_all_processes_saved_alike_serves_any_number_of_them():
    (one,) = pack_data_states({"next_index": 7})["processes"]
    assert unpack_data_state({"processes": [one] * 4}, FOLDER) == {"next_index": 7}


def test_different_positions_serve_only_as_many_processes_as_saved_them():
    states = [pack_data_states({"file": index})["processes"][0] for index in range(2)]
    with pytest.raises(ValueError, match=r"checkpoints/7 has different data positions of 2 proc"):
        unpack_data_state({"processes": states}, FOLDER)
