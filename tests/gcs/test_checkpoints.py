"""Checkpoints and value folders on an object store, which renames nothing at once."""

from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from ivl_jax.checkpoint import (
    NoUsableCheckpointError,
    TrainCheckpointer,
    ValueFolderError,
    folder_replacement,
    load_value,
    save_value,
)
from ivl_jax.checkpoint.steps import committed_steps
from ivl_jax.folder_copies import file_names
from ivl_jax.manifest import MANIFEST_NAME
from tests.checkpoint.conftest import arch, metadata, params, tokenizer
from tests.checkpoint.saved_runs import abstract, assert_same, make_state, run_metadata, save

__all__ = ["arch", "metadata", "params", "tokenizer"]


def test_a_run_comes_back_bit_for_bit_and_old_steps_go(store: epath.Path) -> None:
    with TrainCheckpointer(store, keep=1) as checkpointer:
        for step, nll in ((0, 3.0), (2, 1.0), (5, 2.0), (7, 1.5)):
            assert save(checkpointer, step, nll=nll)
        assert not save(checkpointer, 7)
        assert checkpointer.steps() == [2, 7], "the best and the newest"
    restored = TrainCheckpointer(store, keep=1).restore(abstract(make_state(0)))
    assert restored.step == 7
    assert_same(restored.state, make_state(7))
    assert restored.data_state == {"row": 28}
    assert restored.run_metadata == run_metadata(7)


def test_a_save_that_was_cut_off_is_named_and_written_again(
    store: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TrainCheckpointer(store, keep=3) as checkpointer:
        save(checkpointer, 0)
        save(checkpointer, 4)
    # What a kill leaves: some of the files, without Orbax's mark and without our manifest.
    (store / "4" / MANIFEST_NAME).unlink()
    (store / "4" / "commit_success.txt").unlink()
    (store / "4" / "state" / "manifest.ocdbt").unlink()
    with TrainCheckpointer(store, keep=3) as checkpointer:
        restored = checkpointer.restore(abstract(make_state(0)))
        assert restored.step == 0
        assert "step 4: manifest.json is missing" in caplog.text
        save(checkpointer, 4)
    assert committed_steps(store) == [0, 4]
    assert_same(TrainCheckpointer(store, keep=3).restore(make_state(0)).state, make_state(4))


def test_an_altered_checkpoint_is_not_read(store: epath.Path) -> None:
    with TrainCheckpointer(store, keep=3) as checkpointer:
        save(checkpointer, 0)
    (name, *_) = [name for name in file_names(store / "0" / "state") if "/d/" in f"/{name}"]
    path = store / "0" / "state" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(NoUsableCheckpointError, match=f"state/{name}: altered"):
        TrainCheckpointer(store, keep=3).restore(make_state(0))


@pytest.fixture
def value(metadata: Any, params: Any, tokenizer: Any) -> dict[str, Any]:
    return {"metadata": metadata, "params": params, "tokenizer": tokenizer}


def _assert_is(folder: epath.Path, params: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, load_value(folder).params, params)
    assert [path.name for path in folder.parent.iterdir()] == ["value"], "nothing is left beside it"


def test_a_value_folder_comes_back_and_can_be_replaced(
    store: epath.Path, value: dict[str, Any]
) -> None:
    save_value(store / "value", **value)
    _assert_is(store / "value", value["params"])
    with pytest.raises(FileExistsError, match="set overwrite"):
        save_value(store / "value", **value)
    other = jax.tree.map(lambda x: x + 1, value["params"])
    save_value(store / "value", **value | {"params": other}, overwrite=True)
    _assert_is(store / "value", other)


def test_a_replacement_that_was_cut_off_is_refused_and_can_be_repeated(
    store: epath.Path, value: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store / "value"
    save_value(folder, **value)

    def move_one_file(folder: epath.Path) -> None:
        folder.rmtree()
        building = folder_replacement.building_folder(folder)
        (folder / MANIFEST_NAME).write_bytes((building / MANIFEST_NAME).read_bytes())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ivl_jax.checkpoint.value_folder.finish_replacement", move_one_file)
        with pytest.raises(KeyboardInterrupt):
            save_value(folder, **value, overwrite=True)
    with pytest.raises((ValueFolderError, FileNotFoundError)):
        load_value(folder)
    save_value(folder, **value, overwrite=True)
    _assert_is(folder, value["params"])
