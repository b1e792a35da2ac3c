"""Files, folders and records on an object store: sealed, told apart, never silently local."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from ivl_jax.config import (
    BaseConfig,
    ConfigError,
    DataConfig,
    InferConfig,
    TrainConfig,
    check_infer_config,
    check_train_config,
    load_config,
)
from ivl_jax.data import sealed_folders
from ivl_jax.data.sealed_folders import open_sealed_folder
from ivl_jax.file_lock import record_holder
from ivl_jax.folder_copies import copy_files, file_names
from ivl_jax.json_files import write_json
from ivl_jax.manifest import MANIFEST_NAME
from ivl_jax.paths import (
    LocalPathError,
    MissingExtraError,
    StoreError,
    local_path,
    usable_path,
)
from ivl_jax.training.event_files import EventFiles
from ivl_jax.training.record_file import RecordFile
from ivl_jax.training.run_directory import RunDirectory, RunDirectoryError
from ivl_jax.vocabulary.mapping import load_vocabulary_map, save_vocabulary_map
from ivl_jax.weights.language_model import find_model
from tests.vocabulary.test_mapping import METADATA, _map


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for use in (RunDirectory, usable_path, load_vocabulary_map):
        with pytest.raises(MissingExtraError) as raised:
            use("gs://bucket/runs/one")
        assert str(raised.value) == (
            "gs://bucket/runs/one: gs:// paths need the extra `gcs`: pip install 'ivl_jax[gcs]' "
            "(in a clone: pip install -e '.[gcs]')"
        )


@pytest.mark.usefixtures("gcs_environment")
def test_a_bucket_that_does_not_exist_is_not_created() -> None:
    with pytest.raises(StoreError, match=r"there is no bucket misspelt.*buckets create"):
        RunDirectory("gs://misspelt/runs/one")
    assert not epath.Path("gs://misspelt").exists()


@pytest.mark.usefixtures("gcs_environment")
def test_missing_credentials_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: epath.Path) -> bool:
        raise RuntimeError("Anonymous caller does not have access\nmore")

    monkeypatch.setattr(type(epath.Path("gs://closed")), "exists", refuse)
    with pytest.raises(StoreError, match=r"gs://closed/run: .*: Anonymous caller .* access; are"):
        usable_path("gs://closed/run")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: find_model("gs://b/model"), "gs://b/model: a language model is read from a local"),
        (
            lambda: check_infer_config(InferConfig(input="gs://b/in", output="gs://b/out")),
            r"(?s)--input gs://b/in must be a local path.*--output gs://b/out must be a local path",
        ),
        (
            lambda: check_train_config(
                TrainConfig(
                    run_dir="r",
                    base=BaseConfig(path="b", cache_states=True),
                    data=DataConfig(train=("t",), data_dir="gs://b/data"),
                )
            ),
            "cache_states = true needs a local data.data_dir, got gs://b/data",
        ),
        (
            lambda: check_train_config(TrainConfig(run_dir="r", profile="gs://b/trace")),
            "profile gs://b/trace must be a local path",
        ),
        (lambda: local_path("gs://b/out", "OUT"), "OUT: gs://b/out is not a local path"),
    ],
)
def test_what_must_be_local_says_so(use: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError, LocalPathError), match=message):
        use()


def test_what_others_write_is_seen_at_once(store: epath.Path) -> None:
    import tensorstore

    (store / "one").write_bytes(b"1")
    assert [path.name for path in store.iterdir()] == ["one"]
    bucket, _, folder = str(store).removeprefix("gs://").partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
    tensorstore.KvStore.open(spec).result().write("two", b"2").result()
    assert sorted(path.name for path in store.iterdir()) == ["one", "two"]
    assert (store / "two").exists()


def _fill(calls: list[epath.Path]) -> Callable[[epath.Path], dict[str, Any]]:
    def fill(folder: epath.Path) -> dict[str, Any]:
        calls.append(folder)
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "tokens.bin").write_bytes(bytes(range(200)))
        (folder / "empty.bin").write_bytes(b"")
        return {"dialogues": 3}

    return fill


def _open_in_a_new_process(folder: epath.Path, calls: list[epath.Path]) -> None:
    """Open a sealed folder without the local copy that this process may have."""
    sealed_folders._copies_folder.cache_clear()
    path, record = open_sealed_folder(folder, _fill(calls), what="tokens")
    assert record == {"dialogues": 3}
    assert "://" not in str(path)
    assert (path / "deep" / "tokens.bin").read_bytes() == bytes(range(200))
    assert (path / "empty.bin").read_bytes() == b""


def test_a_sealed_folder_is_filled_once_and_read_from_a_local_copy(store: epath.Path) -> None:
    calls: list[epath.Path] = []
    _open_in_a_new_process(store / "cache", calls)
    _open_in_a_new_process(store / "cache", calls)
    assert len(calls) == 1
    assert "://" not in str(calls[0])
    assert sorted(file_names(store / "cache")) == ["deep/tokens.bin", "empty.bin", MANIFEST_NAME]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep" / "tokens.bin").write_bytes(bytes(200)),
        lambda folder: (folder / "deep" / "tokens.bin").unlink(),
        lambda folder: (folder / MANIFEST_NAME).unlink(),
    ],
    ids=["altered", "missing", "cut_off"],
)
def test_a_damaged_sealed_folder_is_made_again(
    store: epath.Path, damage: Callable[[epath.Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[epath.Path] = []
    _open_in_a_new_process(store / "cache", calls)
    damage(store / "cache")
    _open_in_a_new_process(store / "cache", calls)
    assert len(calls) == 2
    assert "were changed after they were written and are made again" in caplog.text
    _open_in_a_new_process(store / "cache", calls)
    assert len(calls) == 2


def test_the_manifest_is_copied_last(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name in ("a", MANIFEST_NAME):
        (tmp_path / "from" / name).write_text(name)
    with pytest.raises(FileNotFoundError):
        copy_files(
            tmp_path / "from",
            tmp_path / "to",
            [MANIFEST_NAME, "a", "lost"],
            last=(MANIFEST_NAME,),
        )
    assert not (tmp_path / "to" / MANIFEST_NAME).exists()


def test_records_are_written_when_flushed_and_can_be_cut(store: epath.Path) -> None:
    records = RecordFile(store / "metrics.jsonl")
    records.append({"step": 1})
    assert not records.path.exists()
    size = records.flush()
    assert records.path.read_bytes() == b'{"step": 1}\n'
    records.append({"step": 2})
    records.close()
    again = RecordFile(records.path)
    assert again.last_step() == 2
    again.cut(size)
    again.append({"step": 3})
    again.flush()
    again.append({"step": 4})
    again.flush()
    assert records.path.read_bytes() == b'{"step": 1}\n{"step": 3}\n{"step": 4}\n'


def test_events_are_copied_and_hold_every_scalar(store: epath.Path) -> None:
    events = EventFiles(store / "tensorboard", first_step=0)
    events.add("train", {"loss": 2.5}, 1)
    events.copy()
    (name,) = file_names(store / "tensorboard")
    before = len((store / "tensorboard" / name).read_bytes())
    events.add("train", {"loss": 1.5}, 2)
    events.close()
    content = (store / "tensorboard" / name).read_bytes()
    assert content.count(b"train/loss") == 2
    assert len(content) > before


def test_a_run_is_not_locked_but_the_next_one_is_told(
    store: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with record_holder(store / "run.lock"):
        assert json.loads((store / "run.lock").read_text())["host"]
    assert not (store / "run.lock").exists()
    assert "has not said that it has ended" not in caplog.text
    left = {"host": "tpu-7", "pid": 41, "since": "2026-01-02T03:04:05+00:00", "command": "train.py"}
    write_json(store / "run.lock", left)
    with record_holder(store / "run.lock"):
        assert "process 41 on tpu-7, since 2026-01-02T03:04:05+00:00 (train.py)" in caplog.text
        write_json(store / "run.lock", left)
    assert (store / "run.lock").exists(), "it is another's by now"


def test_a_run_that_is_there_is_not_started_again(store: epath.Path) -> None:
    config = TrainConfig(run_dir=str(store / "run"))
    directory = RunDirectory(config.run_dir)
    with directory.claim(config) as there:
        assert not there
        directory.open(config, there=there, weights={"base": {"path": "b", "fingerprint": "f"}})
    assert load_config(str(store / "run" / "config.toml")) == config
    with pytest.raises(RunDirectoryError, match=r"already contains a run.*config.toml --resume"):
        directory.claim(config).__enter__()
    with pytest.raises(ConfigError, match="no config file at gs://"):
        load_config(str(store / "absent.toml"))


def test_a_vocabulary_map_comes_back(store: epath.Path) -> None:
    save_vocabulary_map(store / "map.safetensors", _map(), METADATA)
    read, metadata = load_vocabulary_map(str(store / "map.safetensors"))
    np.testing.assert_array_equal(read.weight, _map().weight)
    assert metadata == METADATA
    assert file_names(store) == ["map.safetensors"]
