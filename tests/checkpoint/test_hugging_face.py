"""A value folder becomes a Hugging Face folder, and PyTorch decodes with it what we decode."""

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivl_jax.checkpoint import load_value, save_value
from ivl_jax.checkpoint.__main__ import main
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.model.decoder import build_decoder, forward
from ivl_jax.weights.language_model import LanguageModel, load_language_model
from tests.decoding.conftest import make_value

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

PROMPT = "Once upon a time"
TOKENS = 40


@pytest.fixture(scope="module")
def stories(stories260k_dir: Path) -> LanguageModel:
    """stories260k as a base."""
    return load_language_model(stories260k_dir)


@pytest.fixture(scope="module")
def folders(stories: LanguageModel, tmp_path_factory) -> tuple[Path, Path]:
    """A value folder for stories260k, and what export-hf makes of it."""
    folder = tmp_path_factory.mktemp("exported")
    value = make_value(stories)
    save_value(
        folder / "value", params=value.params, metadata=value.metadata, tokenizer=value.tokenizer
    )
    assert main(["export-hf", str(folder / "value"), str(folder / "hf")]) == 0
    return folder / "value", folder / "hf"


@pytest.fixture(scope="module")
def example(project_root: Path) -> Any:
    """examples/logits_processor.py as a module."""
    path = project_root / "examples" / "logits_processor.py"
    spec = importlib.util.spec_from_file_location("logits_processor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _OldSpelling:
    """A model whose forward names its cache as transformers did before 5.24."""

    def __init__(self, model: Any) -> None:
        self._model, self.device = model, model.device
        names = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"

    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        return self._model(input_ids, **{self._name: past_key_values})

    __call__ = forward


def test_pytorch_with_the_logits_processor_writes_our_greedy_text(
    stories: LanguageModel, stories260k_dir: Path, folders, example
) -> None:
    model = compose(stories, load_value(folders[0]), strengths=[0.3])
    (ours,) = model.generate([PROMPT], GenerationOptions(max_new_tokens=TOKENS))
    assert len(ours.token_ids) == TOKENS
    base = AutoModelForCausalLM.from_pretrained(stories260k_dir)
    value = AutoModelForCausalLM.from_pretrained(folders[1])
    prompt = torch.tensor([model.encode(PROMPT)])

    def generate(**options: Any) -> list[int]:
        output = base.generate(prompt, do_sample=False, max_new_tokens=TOKENS, **options)
        return output[0, prompt.shape[1] :].tolist()

    of_base, of_value = (AutoTokenizer.from_pretrained(f) for f in (stories260k_dir, folders[1]))
    for spelled in (value, _OldSpelling(value)):
        processor = example.ValueLogits(
            [spelled], [0.3], base_tokenizer=of_base, value_tokenizers=[of_value]
        )
        assert generate(logits_processor=[processor]) == list(ours.token_ids)
    assert generate() != list(ours.token_ids), "the value network changes the text"


def test_the_example_prints_the_text_that_we_print(
    stories: LanguageModel, stories260k_dir: Path, folders, example, monkeypatch, capsys
) -> None:
    # folders[0]: the value folder itself.
    arguments = [str(stories260k_dir), str(folders[0]), PROMPT, "--strength", "0.3", "--chat"]
    monkeypatch.setattr("sys.argv", ["example", *arguments, "--max-new-tokens", "20"])
    example.main()
    model = compose(stories, load_value(folders[0]), strengths=[0.3])
    options = GenerationOptions(max_new_tokens=20)
    (ours,) = model.generate([[Message("user", PROMPT)]], options)
    assert capsys.readouterr().out.strip() == ours.text.strip()


def test_the_exported_networks_logits_are_ours(folders) -> None:
    value = load_value(folders[0])
    tokens = np.random.default_rng(0).integers(0, 512, (2, 40)).astype(np.int32)
    tokens, positions = jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(40), tokens.shape)
    graphdef = build_decoder(value.arch)
    ours = jax.jit(lambda params: forward(graphdef, params, tokens, positions=positions))(
        value.params
    )
    exported = AutoModelForCausalLM.from_pretrained(folders[1])
    with torch.no_grad():
        theirs = exported(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_the_exported_tokenizer_writes_prompts_as_the_value_network_learned_them(folders) -> None:
    value = load_value(folders[0])
    assert value.chat_template == "plain"
    chat = make_chat_format(value.tokenizer, template="plain")
    exported = AutoTokenizer.from_pretrained(folders[1])
    for dialogue in (
        [Message("user", PROMPT)],
        [Message("system", "Be brief."), Message("user", "Hi {{ there }}")],
    ):
        messages = [message._asdict() for message in dialogue]
        written = exported.apply_chat_template(messages, add_generation_prompt=True)
        assert written["input_ids"] == chat.encode_prompt(dialogue).tolist()
    assert value.tokenizer.chat_template is None, "the tokenizer in memory is left as it was"


def test_stop_ids_are_kept(folders) -> None:
    record = json.loads((folders[1] / "generation_config.json").read_text())
    assert record["eos_token_id"] == list(load_value(folders[0]).stop_ids)


@pytest.fixture
def fails_to_load(monkeypatch) -> None:
    """Makes the test fail where the value network's arrays are read."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a value network was loaded")

    monkeypatch.setattr("ivl_jax.checkpoint.value_folder.load_value", fail)


@pytest.mark.usefixtures("fails_to_load")
@pytest.mark.parametrize("connection", ["cascade", "cascade_no_text"])
def test_a_network_that_reads_the_base_is_refused_with_the_reason(
    folders, tmp_path: Path, capsys, connection: str
) -> None:
    record = json.loads((folders[0] / "ivl.json").read_text())
    (tmp_path / "ivl.json").write_text(json.dumps(record | {"connection": connection}))
    assert main(["export-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"connection {connection}, expected residual" in said
    assert "infer.py" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fails_to_load")
def test_a_head_of_several_depths_is_refused_with_the_reason(
    folders, tmp_path: Path, capsys
) -> None:
    record = json.loads((folders[0] / "ivl.json").read_text())
    architecture = record["architecture"] | {"head_depths": 2}
    (tmp_path / "ivl.json").write_text(json.dumps(record | {"architecture": architecture}))
    assert main(["export-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "its head reads a mixture of the last 2 layers (value.depths)" in said
    assert "infer.py" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fails_to_load")
def test_an_unknown_format_version_names_both_and_the_remedy(tmp_path: Path, capsys) -> None:
    (tmp_path / "ivl.json").write_text(
        '{"format_version": 7, "library_versions": {"ivl_jax": "9"}}'
    )
    assert main(["export-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "format_version 7, this version of ivl_jax reads 1" in said
    assert "version 9" in said


@pytest.mark.usefixtures("fails_to_load")
def test_what_is_there_is_not_replaced_unasked(folders, tmp_path: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in folders[1].iterdir()}
    assert main(["export-hf", str(folders[0]), str(folders[1])]) == 1
    assert "set overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folders[1].iterdir()} == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["export-hf", str(folders[0]), str(tmp_path), "--overwrite"]) == 1
    assert "files without config.json" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert main(["export-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is not a value folder" in capsys.readouterr().err
