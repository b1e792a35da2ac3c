"""Every kind of file that the product reads: a sound one, and what reads it.

In: an empty folder. Out: a file in it, and a function that reads the file as the commands do.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint.steps import complete_steps, find_usable_step
from ivl_jax.composed.sources import read_value
from ivl_jax.config import DataConfig, TrainConfig, config_to_toml, load_config
from ivl_jax.data.base_states import open_base_states
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.demonstrations import DemonstrationSource
from ivl_jax.data.formats import FORMATS
from ivl_jax.data.reading import read_split, survey_rows
from ivl_jax.data.sealed_folders import open_sealed_folder
from ivl_jax.decoding.prompt_files import GenerationFile, read_prompts
from ivl_jax.manifest import write_manifest
from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.vocabulary.mapping import load_vocabulary_map
from ivl_jax.vocabulary.texts import read_texts
from ivl_jax.weights.fingerprint import weights_fingerprint
from ivl_jax.weights.hf_folder import find_tensors
from ivl_jax.weights.language_model import read_arch
from tests.fuzz.mutate import Kind

_FIXTURES = Path(__file__).parent.parent / "fixtures" / "exchanged"
_S = family_folder("S")


class Reader(NamedTuple):
    """One kind of file."""

    kind: Kind
    make: Callable[[Path], Path]
    """Puts a sound file, and what belongs to it, into an empty folder; gives the file's path."""
    read: Callable[[Path], object]
    """Reads the file; fails as the product does."""
    named: str = ""
    """What an error must hold; empty: the file's name."""


def _written(name: str, content: str) -> Callable[[Path], Path]:
    """Makes a file of some text."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return make


def _copied(source: Path, file: str) -> Callable[[Path], Path]:
    """Makes a copy of a folder; one of its files is the one to be altered."""

    def make(folder: Path) -> Path:
        shutil.copytree(source, folder / source.name)
        return folder / source.name / file

    return make


# Demonstrations

_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]},
    {"role": "assistant", "content": "5", "weight": 1},
]
_ROWS: list[dict[str, Any]] = [
    {"messages": _TURNS},
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
    {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be kind."},
    {"prompt": "2 + 3?", "completion": _TURNS[-1:]},
    {"messages": {"role": ["user", "assistant"], "content": ["é", "b"], "weight": [1, 0]}},
    {"q": "2 + 3?", "meta": {"a": 5.0}},
]
_TEMPLATES = {"user": "{q}", "assistant": "{meta.a}"}


def _read_rows(path: Path) -> None:
    """In every format: each row is a dialogue, or has its place and a reason."""
    for name, one in FORMATS.items():
        templates = _TEMPLATES if one.reads_templates else {}
        source = DemonstrationSource((str(path),), row_format=name, templates=templates)
        survey = survey_rows(source)
        for place, reason in survey.malformed:
            assert place.startswith(f"{path.name}:"), place
            assert reason
            assert "\n" not in reason
        for split in survey.counts:
            read = list(read_split(source, split, cutoff=survey.cutoff))
            assert len(read) == survey.counts[split]


# Configs


def _sound_config() -> str:
    config = TrainConfig(run_dir="runs/mine", data=DataConfig(train=("a.jsonl", "b.json")))
    return config_to_toml(config) + "\n"


def _read_config(path: Path) -> None:
    """What is accepted can be written and read again."""
    config = load_config(path)
    again = path.with_name("again.toml")
    again.write_text(config_to_toml(config), encoding="utf-8")
    assert load_config(again) == config


def _sound_run(name: str, content: str = "") -> Callable[[Path], Path]:
    """A run directory; the file to be altered is one of its own."""

    def make(folder: Path) -> Path:
        (folder / "config.toml").write_text(_sound_config())
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n')
        if content:
            (folder / name).write_text(content)
        return folder / name

    return make


def _read_run(path: Path) -> None:
    directory = RunDirectory(path.parent)
    config = load_config(path.parent / "config.toml")
    config = dataclasses.replace(config, run_dir=str(path.parent), resume=True)
    there = directory.check(config)
    weights = {"base.path": {"path": "base", "fingerprint": "ab" * 32}}
    directory.check_weights(weights)
    assert directory.metrics.last_step() >= -1
    directory.open(config, there=there, weights=weights)


# Models and value folders


@functools.cache
def _tokenizer() -> Any:
    return load_tokenizer(_S)


def _sound_tensors(folder: Path) -> Path:
    tensors = {f"model.layers.{i}.w": np.ones((2, 3), np.float32) for i in range(3)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _sound_index(folder: Path) -> Path:
    _sound_tensors(folder).rename(folder / "part.safetensors")
    index = {f"model.layers.{i}.w": "part.safetensors" for i in range(3)}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": index}))
    return path


def _read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    describe_tokenizer(tokenizer, path.parent)
    tokenizer("hello world")


def _read_value_folder(path: Path) -> None:
    """As a forger would leave it: the manifest knows the altered file."""
    write_manifest(path.parent, {})
    read_value(str(path.parent))


def _read_checkpoints(path: Path) -> None:
    complete_steps(path.parent.parent)
    find_usable_step(path.parent.parent, None, lambda run: None)


def _sound_map(folder: Path) -> Path:
    record = {
        "format_version": 1,
        "method": "bytes",
        "base_name": "B",
        "base_fingerprint": "b",
        "value_name": "V",
        "value_fingerprint": "v",
        "value_vocab_size": 7,
        "centred": False,
        "token_coverage": 0.5,
        "text_coverage": 1.0,
        "texts": 3,
        "special_pairs": [["end", 2, 1]],
    }
    path = folder / "map.safetensors"
    tensors = {"value_index": np.arange(5, dtype=np.int32), "weight": np.ones(5, np.float32)}
    metadata = {"ivl_jax.vocabulary_map": json.dumps(record)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    return path


def _sound_map_record(folder: Path) -> Path:
    """The JSON text inside a map's header, which a safetensors file takes as it is."""
    content = _sound_map(folder).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    (folder / "record.json").write_text(header["__metadata__"]["ivl_jax.vocabulary_map"])
    return folder / "record.json"


def _read_map_record(path: Path) -> None:
    tensors = {"value_index": np.arange(5, dtype=np.int32), "weight": np.ones(5, np.float32)}
    text = path.read_bytes().decode("utf-8", errors="replace")
    file = path.with_name("map.safetensors")
    safetensors.numpy.save_file(tensors, file, metadata={"ivl_jax.vocabulary_map": text})
    load_vocabulary_map(file)


# Prompts and outputs

_PROMPTS = (
    '{"prompt": "Hi", "id": 7}\n'
    '{"messages": [{"role": "user", "content": "é"}], "strengths": [0.5]}\n'
)
_ADDED = '"text": "Yo", "finish_reason": "stop", "prompt_tokens": 1, "generated_tokens": 1}'
_SETTINGS = {"base": "b", "value": ["v"], "generation": {"seed": 0, "temperature": 0.0}}


def _sound_output(altered: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "in.jsonl").write_text(_PROMPTS)
        (folder / "out.jsonl").write_text(f'{{"prompt": "Hi", "id": 7, {_ADDED}\n')
        (folder / "out.jsonl.settings.json").write_text(json.dumps(_SETTINGS))
        return folder / altered

    return make


def _read_output(path: Path) -> None:
    folder = path.parent
    rows = read_prompts(folder / "in.jsonl", values=1)
    with GenerationFile(folder / "out.jsonl", settings=_SETTINGS, rows=rows) as file:
        assert 0 <= file.done <= len(rows)


# Templates

_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + eos_token + '\n' }}{% endgeneration %}"
    "{% else %}{{ m.content ~ eos_token ~ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _read_template(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", errors="replace")
    # What holds no tag is the name of a template, not one.
    make_chat_format(_tokenizer(), template=text if "{" in text else text + "{{ messages }}")


# Caches


def _states(path: Path) -> None:
    open_base_states(
        path.parent,
        identity={"base": "ab" * 32, "length": 9},
        positions=np.array([3, 4], np.int64),
        width=2,
        dtype="float32",
    )


def _sound_states(folder: Path) -> Path:
    _states(folder / "states.json")
    return folder / "states.json"


def _fill(folder: epath.Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "tokens.bin").write_bytes(bytes(range(200)))
    return {"dialogues": 3, "malformed": []}


def _sound_cache(altered: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        open_sealed_folder(epath.Path(folder / "cache"), _fill, what="tokens")
        return folder / "cache" / altered

    return make


def _read_cache(path: Path) -> None:
    """Whatever was altered, what was filled in is what is read."""
    _, record = open_sealed_folder(epath.Path(path.parent), _fill, what="tokens")
    assert record == {"dialogues": 3, "malformed": []}
    assert (path.parent / "tokens.bin").read_bytes() == bytes(range(200))


def _sound_memory(folder: Path) -> Path:
    (folder / "model").mkdir()
    _sound_tensors(folder / "model")
    weights_fingerprint(folder / "model", remembered=folder / "memory.json")
    return folder / "memory.json"


def _read_memory(path: Path) -> None:
    """Whatever was altered, the fingerprint is that of the weights."""
    model = path.parent / "model"
    assert weights_fingerprint(model, remembered=path) == weights_fingerprint(model)


_STARTS = '[{"time": "2026-01-01", "command": ["train.py"], "versions": {"jax": "0.10.2"}}]\n'
_WEIGHTS = json.dumps({"base.path": {"path": "base", "fingerprint": "ab" * 32}})
_TEXTS: list[Any] = [{"q": "Q?", "id": 7}, {"messages": _TURNS[2:]}, "just a text"]
_TEXT_LINES = "".join(json.dumps(row) + "\n" for row in _TEXTS)
_ROW_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS)

READERS: dict[str, Reader] = {
    "rows.jsonl": Reader("lines", _written("rows.jsonl", _ROW_LINES), _read_rows),
    "rows.json": Reader("json", _written("rows.json", json.dumps(_ROWS)), _read_rows),
    "config.toml": Reader("text", _written("mine.toml", _sound_config()), _read_config),
    "run/config.toml": Reader("text", _sound_run("config.toml"), _read_run),
    "run/starts.json": Reader("json", _sound_run("starts.json", _STARTS), _read_run),
    "run/weights.json": Reader("json", _sound_run("weights.json", _WEIGHTS), _read_run),
    "run/metrics.jsonl": Reader("lines", _sound_run("metrics.jsonl"), _read_run),
    "config.json": Reader("json", _copied(_S, "config.json"), lambda path: read_arch(path.parent)),
    "model.safetensors": Reader(
        "safetensors", _sound_tensors, lambda path: find_tensors(path.parent)
    ),
    "index.json": Reader("json", _sound_index, lambda path: find_tensors(path.parent)),
    "tokenizer.json": Reader("json", _copied(_S, "tokenizer.json"), _read_tokenizer),
    "tokenizer_config.json": Reader("json", _copied(_S, "tokenizer_config.json"), _read_tokenizer),
    "generation_config.json": Reader(
        "json",
        _copied(_S, "generation_config.json"),
        lambda path: describe_tokenizer(_tokenizer(), path.parent),
    ),
    "ivl.json": Reader("json", _copied(_FIXTURES / "cascade", "ivl.json"), _read_value_folder),
    "manifest.json": Reader(
        "json",
        _copied(_FIXTURES / "cascade", "manifest.json"),
        lambda path: read_value(str(path.parent)),
    ),
    "checkpoint/manifest.json": Reader(
        "json", _copied(_FIXTURES / "run" / "checkpoints", "211/manifest.json"), _read_checkpoints
    ),
    "map.safetensors": Reader("safetensors", _sound_map, load_vocabulary_map),
    "map record": Reader("json", _sound_map_record, _read_map_record, named="map.safetensors"),
    "texts.jsonl": Reader(
        "lines", _written("texts.jsonl", _TEXT_LINES), lambda path: read_texts([path])
    ),
    "texts.json": Reader(
        "json", _written("texts.json", json.dumps(_TEXTS)), lambda path: read_texts([path])
    ),
    "texts.txt": Reader(
        "text", _written("texts.txt", "Some text.\nAnd é.\n"), lambda path: read_texts([path])
    ),
    "prompts.jsonl": Reader(
        "lines", _written("prompts.jsonl", _PROMPTS), lambda path: read_prompts(path, values=1)
    ),
    "output.jsonl": Reader("lines", _sound_output("out.jsonl"), _read_output),
    "output settings": Reader("json", _sound_output("out.jsonl.settings.json"), _read_output),
    "template": Reader(
        "text", _written("template.jinja", _TEMPLATE), _read_template, named="chat template"
    ),
    "states.json": Reader("json", _sound_states, _states),
    "cache/manifest.json": Reader("json", _sound_cache("manifest.json"), _read_cache),
    "cache/tokens.bin": Reader("bytes", _sound_cache("tokens.bin"), _read_cache),
    "remembered hashes": Reader("json", _sound_memory, _read_memory),
}
