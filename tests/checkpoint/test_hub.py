"""Value folders go to the hub in one commit, and come back by name; failures say what to do."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import jax
import numpy as np
import pytest

from ivl_jax.checkpoint import ValueFolderError, load_value, push_to_hub, save_value
from ivl_jax.checkpoint.__main__ import main
from ivl_jax.checkpoint.hub import HubError, find_value_folder, value_on_hub
from ivl_jax.composed.sources import read_value
from ivl_jax.manifest import MANIFEST_NAME
from tests.checkpoint.hub_stand_in import TOKEN, Hub, serve_hub

NAME = "someone/value"
FOLDER = Path(__file__).parents[1] / "fixtures" / "exchanged" / "residual"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    """An empty hub, and a user who is logged in; what HF_ENDPOINT and HF_HOME would set."""
    with serve_hub() as hub:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)  # as all other tests are
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A value folder with a card."""
    shutil.copytree(FOLDER, tmp_path / "value")
    (tmp_path / "value" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "value"


def test_a_value_network_comes_back_from_the_hub_exactly(
    hub: Hub, tmp_path: Path, params, metadata, tokenizer
) -> None:
    save_value(tmp_path / "value", params=params, metadata=metadata, tokenizer=tokenizer)
    url = push_to_hub(tmp_path / "value", NAME)
    assert url.startswith(f"{hub.endpoint}/{NAME}/commit/")
    assert hub.files(NAME)["README.md"] == (tmp_path / "value" / "README.md").read_bytes()
    shutil.rmtree(tmp_path / "value")
    value = load_value(NAME)
    jax.tree.map(np.testing.assert_array_equal, value.params, params)
    assert value.metadata == metadata
    assert read_value(NAME).metadata == metadata, "what --value reads"


def test_a_second_upload_leaves_no_file_of_the_first(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, NAME)
    first = hub.commit(NAME, "main")
    assert first is not None
    other = FOLDER.parent / "linear"
    push_to_hub(other, NAME)
    arrays = {name for name in hub.files(NAME) if name.startswith("params/")}
    assert arrays == {
        f"params/{path.relative_to(other / 'params').as_posix()}"
        for path in (other / "params").rglob("*")
        if path.is_file()
    }
    assert len(hub.branches[NAME]["main"]) == 3, "one commit each"
    assert value_on_hub(f"{NAME}@{first[0]}") != value_on_hub(NAME)
    old = find_value_folder(NAME, revision=first[0])
    assert json.loads((old / "ivl.json").read_text())["connection"] == "residual"


def test_a_branch_is_pushed_and_read_by_its_name(hub: Hub, folder: Path, capsys) -> None:
    push_to_hub(FOLDER.parent / "linear", NAME)
    assert main(["push", str(folder), NAME, "--revision", "trial"]) == 0
    assert f"{hub.endpoint}/{NAME}/commit/" in capsys.readouterr().out
    for path, connection in ((NAME, "linear"), (f"{NAME}@trial", "residual")):
        assert read_value(path).scheme.name == connection


def test_downloads_are_of_the_value_folder_only_and_made_once(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, NAME)
    hub.files(NAME)["plots/large.png"] = b"0"
    found = find_value_folder(NAME)
    assert not (found / "plots").exists()
    hub.asked.clear()
    assert find_value_folder(NAME) == found
    assert not [line for line in hub.asked if "resolve" in line]


def test_a_local_folder_goes_before_the_hub(hub: Hub, folder: Path) -> None:
    shutil.copytree(folder, NAME)
    assert str(find_value_folder(NAME)) == str(folder.parent / NAME)
    assert not hub.asked
    with pytest.raises(ValueError, match=r"someone/value: revision 'v1' applies to the hub"):
        find_value_folder(NAME, revision="v1")


def _without_token(hub: Hub, folder: Path, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def _with_a_wrong_token(hub: Hub, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reads")


def _offline(hub: Hub, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


def _unreachable(hub: Hub, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")


def _not_a_value_folder(hub: Hub, folder: Path, monkeypatch) -> None:
    (folder / "ivl.json").unlink()


def _damaged(hub: Hub, folder: Path, monkeypatch) -> None:
    (folder / "params" / "_METADATA").unlink()


def _half_copied(hub: Hub, folder: Path, monkeypatch) -> None:
    (folder / MANIFEST_NAME).unlink()


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (_without_token, HubError, r"someone/value: .* access token, .* run `hf auth login`"),
        (_with_a_wrong_token, HubError, r"someone/value: the hub refuses .*HTTP 401.*may write"),
        (_offline, HubError, r"someone/value: the hub .* cannot be reached .*HF_HUB_OFFLINE"),
        (_unreachable, HubError, r"127\.0\.0\.1:9\) cannot be reached \(ConnectError\)"),
        (_not_a_value_folder, FileNotFoundError, r"value is not a value folder; a training run"),
        (_damaged, ValueFolderError, r"_METADATA: missing; export the value network again"),
        (_half_copied, ValueFolderError, r"manifest\.json is missing.*copy the folder again"),
    ],
)
def test_an_upload_that_cannot_be_says_why(
    hub: Hub, folder: Path, monkeypatch, spoil, kind, said: str
) -> None:
    spoil(hub, folder, monkeypatch)
    with pytest.raises(kind, match=said) as raised:
        push_to_hub(folder, NAME)
    assert "\n" not in str(raised.value)
    assert not hub.branches


@pytest.mark.parametrize("name", ["value", "a/b/c", "a/b@main", "a b/c"])
def test_an_upload_needs_a_repositorys_name(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected a repository on the hub, owner/name"):
        push_to_hub(folder, name)
    assert not hub.asked


def test_a_description_of_a_run_is_not_uploaded(hub: Hub) -> None:
    with pytest.raises(ValueFolderError, match="has no arrays: it only describes a run"):
        push_to_hub(FOLDER.parent / "run" / "value_description", NAME)


def test_a_value_network_that_cannot_be_downloaded_says_why(
    hub: Hub, folder: Path, monkeypatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder here .* the hub has no model"):
        load_value("someone/else")
    with pytest.raises(FileNotFoundError, match="neither a value folder nor a language model"):
        read_value("someone/else")
    push_to_hub(folder, NAME)
    with pytest.raises(FileNotFoundError, match="the hub has no revision 'v9'"):
        load_value(NAME, revision="v9")
    del hub.files(NAME)["ivl.json"]
    with pytest.raises(FileNotFoundError, match=r"has no ivl\.json: it is not a value folder"):
        load_value(NAME)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        load_value("someone/third")


def test_an_altered_file_on_the_hub_is_named(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, NAME)
    hub.files(NAME)["params/_METADATA"] = b"{}"
    with pytest.raises(ValueFolderError, match="params/_METADATA: expected"):
        load_value(NAME)
