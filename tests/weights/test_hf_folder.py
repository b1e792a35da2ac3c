from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ivl_jax.tree_compare import TreeMismatchError
from ivl_jax.weights.hf_folder import find_tensors, new_folder

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ONE = np.ones(4, np.float32)


def test_one_file_and_shards_with_an_index_are_found_alike(write_folder: Callable) -> None:
    single = write_folder({"model.safetensors": {"x": ONE, "y": ONE}}, name="single")
    sharded = write_folder({A: {"x": ONE}, B: {"y": ONE}}, name="sharded")
    assert set(find_tensors(single)) == set(find_tensors(sharded)) == {"x", "y"}
    assert find_tensors(sharded)["y"].file.name == B


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickle_files_are_refused_with_the_remedy(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match=rf"{file}.*can run code.*save_pretrained"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [("adapter_model.safetensors", "merge the adapter"), (A, "download the index")],
)
def test_other_safetensors_files_get_their_own_remedy(
    write_folder: Callable, file: str, remedy: str
) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{file}; {remedy}"):
        find_tensors(write_folder({file: {"x": ONE}}))


def test_an_empty_or_absent_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="this is the folder of a model"):
        find_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_tensors(tmp_path / "absent")


def test_a_file_next_to_an_index_is_ambiguous(write_folder: Callable) -> None:
    write_folder({A: {"x": ONE}, B: {"y": ONE}})
    with pytest.raises(ValueError, match="got both"):
        find_tensors(write_folder({"model.safetensors": {"x": ONE}}))


def test_a_tensor_in_two_shards_is_an_error_that_names_both(write_folder: Callable) -> None:
    folder = write_folder({A: {"x": ONE, "t": ONE}, B: {"t": ONE}}, index={"x": A, "t": B})
    with pytest.raises(TreeMismatchError, match=rf"t: set twice: t in {A}, t in {B}"):
        find_tensors(folder)


def test_a_tensor_under_two_spellings_is_set_twice(write_folder: Callable) -> None:
    names = ("model.norm.weight", "language_model.model.norm.weight")
    folder = write_folder({"model.safetensors": dict.fromkeys(names, ONE)})
    with pytest.raises(TreeMismatchError, match=r"model\.norm\.weight: set twice"):
        find_tensors(folder)


def test_a_tensor_named_twice_in_the_index_is_an_error(write_folder: Callable) -> None:
    folder = write_folder({A: {"x": ONE}, B: {"y": ONE}})
    text = '{"weight_map": {"x": "%s", "y": "%s", "x": "%s"}}' % (A, B, B)  # noqa: UP031
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json, line 1, .*the key 'x' appears twice"):
        find_tensors(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {"x": 3}}', '{"weight_map": {}}', "{"]
)
def test_an_index_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json.*not a shard index: download it again"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "loop", "\ud800"])
def test_an_index_that_names_what_cannot_be_a_file_is_an_error(
    write_folder: Callable, name: str
) -> None:
    folder = write_folder({}, index={"x": name})
    (folder / "loop").symlink_to("loop")
    with pytest.raises(
        TreeMismatchError, match=r"not a file name \(.* in model\.safetensors\.index"
    ):
        find_tensors(folder)


def test_everything_wrong_with_shards_is_listed_at_once(write_folder: Callable) -> None:
    c, d = "c.safetensors", "d.safetensors"
    folder = write_folder(
        {A: {"x": ONE}, B: {"y": ONE, "z": ONE}, c: {"w": ONE}},
        index={"x": A, "y": A, "z": B, "w": c, "v": d},
    )
    (folder / c).write_bytes((folder / c).read_bytes()[:-4])
    with pytest.raises(TreeMismatchError) as error:
        find_tensors(folder)
    message = str(error.value)
    assert f"y: expected in {A} by {INDEX}, got nothing" in message
    assert f"y: expected {A} by {INDEX}, got it in {B}" in message
    assert f"{c}: truncated" in message
    assert f"{d}: expected a file by model.safetensors.index.json, got nothing" in message
    assert str(folder) in message
    assert "ownload" in message


@pytest.mark.parametrize("shard", ["../../blobs/1234", "{tmp}/blobs/1234", "a/../../x", "/etc"])
def test_an_index_never_leads_outside_its_folder(
    write_folder: Callable, tmp_path: Path, shard: str
) -> None:
    # Not even in the hub's cache, where links to these files are followed.
    write_folder({"1234": {"x": ONE}}, name="blobs")
    (tmp_path / "snapshots").mkdir()
    folder = write_folder({}, index={"x": shard.format(tmp=tmp_path)}, name="snapshots/abc")
    with pytest.raises(TreeMismatchError, match=r"expected a file inside the folder \(in model"):
        find_tensors(folder)


@pytest.mark.parametrize("index", [None, {"x": "model.safetensors"}])
def test_a_link_out_of_the_folder_is_refused(
    write_folder: Callable, tmp_path: Path, index: dict | None
) -> None:
    write_folder({"out.safetensors": {"x": ONE}}, name=".")
    name = "model.safetensors" if index is None else "part.safetensors"
    folder = write_folder({}, index=index and {"x": name})
    (folder / name).symlink_to(tmp_path / "out.safetensors")
    with pytest.raises(TreeMismatchError, match=rf"{name}: .*got a link to .*out\.safetensors"):
        find_tensors(folder)


def test_a_link_out_through_a_linked_subfolder_is_refused(
    write_folder: Callable, tmp_path: Path
) -> None:
    write_folder({"x.safetensors": {"x": ONE}}, name="elsewhere")
    folder = write_folder({}, index={"x": "sub/x.safetensors"})
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TreeMismatchError, match="got a link to"):
        find_tensors(folder)


def test_the_links_of_the_hub_cache_are_followed(write_folder: Callable, tmp_path: Path) -> None:
    write_folder({"1234": {"x": ONE}}, name="blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert set(find_tensors(snapshot)) == {"x"}
    (tmp_path / "alias").symlink_to(snapshot)
    assert set(find_tensors(tmp_path / "alias")) == {"x"}


def test_links_to_blobs_are_followed_in_the_hub_cache_only(
    write_folder: Callable, tmp_path: Path
) -> None:
    write_folder({"1234": {"x": ONE}}, name="blobs")
    folder = tmp_path / "models" / "abc"  # laid out alike, but under no snapshots/
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to("../../blobs/1234")
    with pytest.raises(TreeMismatchError, match="got a link to"):
        find_tensors(folder)


def test_a_new_folder_may_be_named_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder(Path("~/model"), overwrite=False):
        pass
    assert (tmp_path / "model").is_dir()


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with new_folder(final, overwrite=False) as staging:
        (staging / "config.json").write_text("{}")
        assert not final.exists()
        assert staging.parent == final.parent  # one file system: the rename is atomic
    assert [path.name for path in final.parent.iterdir()] == ["model"]
    assert (final / "config.json").read_text() == "{}"


def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "model", overwrite=False) as staging:
            (staging / "config.json").write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_not_carried_over(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model", overwrite=False) as staging:
        name = staging.name
    (tmp_path / name).mkdir()
    (tmp_path / name / "stale").touch()
    with new_folder(tmp_path / "model", overwrite=False):
        pass
    assert list((tmp_path / "model").iterdir()) == []


def test_a_folder_with_files_is_replaced_only_when_told(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "config.json").write_text("old")
    (final / "stale").touch()
    with pytest.raises(FileExistsError, match="set overwrite"), new_folder(final, overwrite=False):
        pass
    with new_folder(final, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (final / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]
    assert (final / "config.json").read_text() == "new"


def test_overwriting_spares_folders_that_are_not_models(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(FileExistsError, match=r"without config\.json"),
        new_folder(tmp_path, overwrite=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
