import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from ivl_jax.model.decoder import build_decoder, forward
from ivl_jax.sharding import LAYOUTS, bytes_per_device, make_mesh
from ivl_jax.weights import language_model
from ivl_jax.weights.language_model import (
    LanguageModel,
    find_model,
    load_language_model,
    read_arch,
    save_language_model,
)


@pytest.fixture(scope="module")
def stories(stories260k_dir: Path) -> LanguageModel:
    return load_language_model(stories260k_dir)


@pytest.fixture
def stories_copy(stories260k_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "stories"
    shutil.copytree(stories260k_dir, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def _greedy(model: LanguageModel, count: int) -> list[int]:
    """Arg-max with a whole forward pass a token: slow, and nothing to get wrong."""
    graphdef = build_decoder(model.arch)
    length = count + 1
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    @jax.jit
    def step(params, tokens, at):
        best = jnp.argmax(forward(graphdef, params, tokens, positions=positions)[0, at])
        return tokens.at[0, at + 1].set(best.astype(jnp.int32))

    tokens = jnp.zeros((1, length), jnp.int32).at[0, 0].set(model.tokenizer_info.bos_id)
    for at in range(count):
        tokens = step(model.params, tokens, at)
    return np.asarray(tokens)[0].tolist()


def test_stories260k_prints_the_published_greedy_text(
    stories: LanguageModel, stories260k_dir: Path
) -> None:
    text = stories.tokenizer.decode(_greedy(stories, 200), skip_special_tokens=True)
    assert text == (stories260k_dir / "expected_greedy.txt").read_text(encoding="utf-8")


def test_a_local_folder_gives_everything_a_model_needs(
    stories: LanguageModel, stories260k_dir: Path
) -> None:
    assert stories.path == str(stories260k_dir)
    assert stories.arch.num_hidden_layers == 5
    assert stories.tokenizer_info.bos_id == 1
    assert stories.stop_ids == (2,)
    assert stories.params["embed_tokens"]["embedding"].dtype == jnp.float32
    assert "params" not in repr(stories)


def test_a_mesh_splits_the_parameters_and_changes_none(
    stories: LanguageModel, stories260k_dir: Path
) -> None:
    mesh = make_mesh(fsdp=2, tensor=4)
    split = load_language_model(stories260k_dir, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split.params, stories.params)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(stories.params))
    assert max(bytes_per_device(split.params).values()) < 1.05 * total / 8 + 4 * 11 * 64
    assert len(bytes_per_device(split.params)) == 8


def test_the_layout_given_decides_padding_and_places(stories260k_dir: Path) -> None:
    mesh = make_mesh(tensor=3, devices=jax.devices()[:3])
    split = load_language_model(stories260k_dir, mesh=mesh).params["embed_tokens"]["embedding"]
    assert split.shape[0] == 576  # 512 divides neither by 3 nor, with 3, by 64
    assert split.sharding.spec[0] == "tensor"
    whole = load_language_model(stories260k_dir, mesh=mesh, sharding_rules=LAYOUTS["replicated"])
    assert whole.params["embed_tokens"]["embedding"].shape[0] == 512
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole.params))


def test_no_head_is_cut_in_two(stories260k_dir: Path) -> None:
    # 8 heads divide over 8 devices; 4 kv heads do not, though their 32 columns would.
    params = load_language_model(stories260k_dir, mesh=make_mesh(tensor=8)).params
    attention = params["layers"][0]["self_attn"]
    assert not attention["q_proj"]["kernel"].is_fully_replicated
    assert attention["k_proj"]["kernel"].is_fully_replicated


def test_saving_and_loading_again_gives_the_same_model(
    stories: LanguageModel, tmp_path: Path
) -> None:
    save_language_model(tmp_path / "saved", stories, dtype=jnp.float32)
    again = load_language_model(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, again.params, stories.params)
    assert again.arch == stories.arch
    assert again.tokenizer_info == stories.tokenizer_info
    assert again.stop_ids == stories.stop_ids
    text = "Once upon a time, Lily's mom\n"
    assert again.tokenizer(text).input_ids == stories.tokenizer(text).input_ids


def test_every_id_that_stops_a_text_survives_saving(stories_copy: Path, tmp_path: Path) -> None:
    record = {"eos_token_id": [2, 7, 9], "bos_token_id": 1}
    (stories_copy / "generation_config.json").write_text(json.dumps(record))
    model = load_language_model(stories_copy)
    assert model.stop_ids == (2, 7, 9)
    save_language_model(tmp_path / "saved", model, dtype=jnp.float32)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 7, 9]
    assert saved["bos_token_id"] == 1
    assert load_language_model(tmp_path / "saved").stop_ids == (2, 7, 9)


def test_transformers_generates_from_a_saved_model(
    stories: LanguageModel, stories260k_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_language_model(tmp_path / "saved", stories, dtype=jnp.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    prompt = tokenizer("", return_tensors="pt")
    tokens = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)
    expected = (stories260k_dir / "expected_greedy.txt").read_text(encoding="utf-8")
    assert expected.startswith(tokenizer.decode(tokens[0], skip_special_tokens=True))


def test_a_model_is_replaced_only_when_told(stories: LanguageModel, tmp_path: Path) -> None:
    save_language_model(tmp_path / "saved", stories, dtype=jnp.float32)
    (tmp_path / "saved" / "stale.json").touch()
    with pytest.raises(FileExistsError, match="set overwrite"):
        save_language_model(tmp_path / "saved", stories, dtype=jnp.float32)
    save_language_model(tmp_path / "saved", stories, dtype=jnp.bfloat16, overwrite=True)
    assert not (tmp_path / "saved" / "stale.json").exists()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_save_that_fails_leaves_nothing(stories: LanguageModel, tmp_path: Path) -> None:
    broken = dataclasses.replace(stories, params={"embed_tokens": stories.params["embed_tokens"]})
    with pytest.raises(ValueError, match="does not fit"):
        save_language_model(tmp_path / "saved", broken, dtype=jnp.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_model_is_an_error(stories_copy: Path) -> None:
    config = json.loads((stories_copy / "config.json").read_text())
    (stories_copy / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(ValueError, match=r"at most 500 ids .* got 512"):
        load_language_model(stories_copy)


def test_a_bad_config_is_named_with_its_folder(stories_copy: Path) -> None:
    (stories_copy / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"stories/config\.json: model_type: .*gpt2"):
        load_language_model(stories_copy)
    malformed = '{"model_type": "llama", "rope_scaling": {"rope_type": [1]}}'
    (stories_copy / "config.json").write_text(malformed)
    with pytest.raises(ValueError, match=r"(?s)config\.json: .*rope_type: got \[1\]"):
        load_language_model(stories_copy)
    (stories_copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json, line 1, column 2: not JSON"):
        load_language_model(stories_copy)
    (stories_copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json"):
        load_language_model(stories_copy)


@pytest.mark.parametrize("layers", [4, 6, 1000])
def test_another_number_of_layers_than_the_weights_have_is_refused_before_a_layer_is_built(
    stories_copy: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    path = stories_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    monkeypatch.setattr("ivl_jax.weights.language_model.load_tokenizer", None)  # nor anything read
    expected = rf"config\.json: num_hidden_layers: expected 5, .* got {layers}; check that both"
    with pytest.raises(ValueError, match=expected):
        load_language_model(stories_copy)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"]
)
def test_an_absurd_size_is_refused_at_once(stories_copy: Path, name: str) -> None:
    path = stories_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 2**30}))
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"(?s)stories.*(expected|does not divide)"):
        load_language_model(stories_copy)
    assert time.thread_time() - start < 10  # seconds; under one on an idle core


def test_code_that_config_json_names_is_noticed_once_and_never_run(
    stories_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((stories_copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (stories_copy / "config.json").write_text(json.dumps(config))
    (stories_copy / "modeling_own.py").write_text("raise SystemExit('ran')")
    with caplog.at_level(logging.WARNING):
        assert read_arch(stories_copy) == read_arch(stories_copy)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{stories_copy}/config.json: auto_map names Python code" in caplog.text


def test_a_local_folder_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name") == Path("owner/name")
    with pytest.raises(ValueError, match="a local folder has this name"):
        find_model("owner/name", revision="main")


@pytest.mark.parametrize("name", ["./model", "../model", "~/model", "/absent/model", Path("a/b")])
def test_what_can_only_be_a_path_never_asks_the_hub(
    name: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_model, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_model(name)


def test_offline_the_error_says_what_to_do() -> None:
    with pytest.raises(FileNotFoundError, match=r"hub cannot be reached.*`hf download no/model`"):
        find_model("no/model")
    with pytest.raises(FileNotFoundError, match="not a hub id"):
        find_model("a/b/c")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (GatedRepoError, "licence to be accepted"),
        (RepositoryNotFoundError, "no model of this name, or it is private"),
        (RevisionNotFoundError, "no revision 'v9'"),
        (LocalEntryNotFoundError, "not in the hub's cache"),
        (OfflineModeIsEnabled, "hub cannot be reached"),
    ],
)
def test_each_failure_of_the_hub_has_its_remedy(
    error: type[Exception], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = SimpleNamespace(headers={}, request=None)
    local = error in (LocalEntryNotFoundError, OfflineModeIsEnabled)
    raised = error("x") if local else error("x", response=response)

    def fail(*_: object, **__: object) -> str:
        raise raised

    monkeypatch.setattr(language_model, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=remedy):
        find_model("owner/name", revision="v9")


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = {
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
        "chat_template.jinja", "merges.txt", "vocab.json",
    }  # fmt: skip
    others = {
        "pytorch_model.bin", "consolidated.safetensors", "README.md", "original/params.json",
        "onnx/model.safetensors", "flax_model.msgpack", ".gitattributes", "model.gguf",
    }  # fmt: skip
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(name=name, revision=options.pop("revision"))
        asked["files"] = set(filter_repo_objects(sorted(wanted | others), **options))
        return str(tmp_path)

    monkeypatch.setattr(language_model, "snapshot_download", download)
    assert find_model("owner/name", revision="abc") == tmp_path
    assert asked == {"name": "owner/name", "revision": "abc", "files": wanted}
