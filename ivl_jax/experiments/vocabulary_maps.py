"""Compares vocabulary maps: `python -m ivl_jax.experiments vocabulary_maps --value VALUE`.

In: a value network trained with S. Out: what it does on X, whose tokenizer is another, through each
kind of map: nats per byte by kind of text, and questions answered word for word. The exact figures
are X's next-byte distribution times what the value network changes in S's.
"""

import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import ValueNetwork, load_value
from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import run_command
from ivl_jax.config import ConfigError
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.evaluation.byte_model import ByteReader
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.experiments.answer_scores import answer_rows
from ivl_jax.experiments.demonstrations import Item, build_items, select
from ivl_jax.experiments.measure import (
    exact_match,
    family_map,
    running_texts,
    share_answered,
)
from ivl_jax.vocabulary.alignment import Method
from ivl_jax.vocabulary.byte_paths import ByteModel, ComposedBytes, byte_nll, greedy_bytes
from ivl_jax.vocabulary.samples import SAMPLE_TEXTS
from ivl_jax.weights.language_model import LanguageModel, load_language_model

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments vocabulary_maps"
_ANSWER_BYTES = 96
_BATCH = 16

Figures = dict[str, float]
"""Nats per byte by kind of text; and `exact_match`, a share."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare vocabulary maps from S to X with each other and with exact byte-level composition."""

    value: str = ""
    """The folder of a value network trained with S, such as the demo's runs/demo/training/value."""
    facts: int = 40
    """Held-out questions on facts, spread over all of them."""
    docstrings: int = 12
    """Held-out questions on docstrings, spread over all of them."""
    prune: float = 1e-3
    """Exact composition drops token sequences with less than this share of a text's probability."""
    output: Path | None = None
    """JSON file of the figures; None: only print the table."""


class _Text(NamedTuple):
    """A text to score after a prompt."""

    prompt: EncodedPrompt
    """Read by both models in their own tokens."""
    ids: list[int]
    """The text in X's tokens, its end included if it ends."""
    spelled: bytes
    """The text."""
    ends: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return run_command(_PROGRAM, _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM)
    log_to_stderr()
    problems = [
        *([] if options.value else ["--value is missing: name a value folder trained with S"]),
        *([] if options.facts > 0 else [f"--facts {options.facts}: expected at least 1"]),
        *([] if options.docstrings > 0 else [f"--docstrings {options.docstrings}: at least 1"]),
        *([] if 0 <= options.prune < 1 else [f"--prune {options.prune}: expected 0 to 1"]),
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    value = load_value(options.value)
    figures = compare_maps(value, build_items(), options)
    sys.stdout.write(markdown_table(figures) + "\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare_maps(
    value: ValueNetwork | LanguageModel, items: Sequence[Item], options: Options
) -> dict[str, Figures]:
    """Measure a value network on X through each map and exactly.

    Args:
        value: trained with S, or another model of its tokenizer.
        items: from `build_items`.
        options: of the command line.

    Returns:
        By method (`X alone`, the maps, `exact`), its figures.
    """
    base, trained_with = (load_language_model(str(family_folder(name))) for name in ("X", "S"))
    mapped = _mapped_models(base, value, running_texts(items))
    test = select(list(items), "test")
    asked = {
        kind: _spread([item for item in test if item.kind == kind], number)
        for kind, number in (("fact", options.facts), ("docstring", options.docstrings))
    }
    # Every method reads the same prompts.
    reader = next(iter(mapped.values()))
    texts = {kind: _answers_as_texts(reader, chosen) for kind, chosen in asked.items()}
    samples = {kind: SAMPLE_TEXTS[kind] for kind in ("prose", "digits", "code")}
    for kind, lines in {**samples, "Chinese": SAMPLE_TEXTS["CJK"][:2]}.items():
        texts[kind] = _plain_texts(reader, lines)
    facts = asked["fact"]
    figures: dict[str, Figures] = {}
    for name, model in {"X alone": compose(base), **mapped}.items():
        figures[name] = {kind: _token_nll(model, each) for kind, each in texts.items()}
        figures[name]["exact_match"] = share_answered(model, facts)
        logger.info("%s: %s", name, figures[name])
    begin = _exact(base, trained_with, value, prune=options.prune)
    exact = {kind: _exact_nll(begin, each) for kind, each in texts.items()}
    spelled = [greedy_bytes(begin(text.prompt), limit=_ANSWER_BYTES) for text in texts["fact"]]
    found = [each.decode(errors="replace").strip() for each in spelled]
    figures["exact"] = {**exact, "exact_match": exact_match(found, facts)}
    logger.info("exact: %s", figures["exact"])
    return figures


def markdown_table(figures: dict[str, Figures]) -> str:
    """The figures as a table.

    Args:
        figures: from `compare_maps`.

    Returns:
        Markdown, one row per method.
    """
    columns = list(next(iter(figures.values())))
    names = [name.replace("exact_match", "facts answered") for name in columns]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(columns)]
    for method, row in figures.items():
        cells = [f"{row[c]:.1%}" if c == "exact_match" else f"{row[c]:.3f}" for c in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mapped_models(
    base: LanguageModel, value: ValueNetwork | LanguageModel, texts: Sequence[str]
) -> dict[str, ComposedModel]:
    """X with the value network, by map."""
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in get_args(Method):
            path = Path(folder) / f"{method}.safetensors"
            family_map(base, value, texts, path=path, method=method)
            models[method] = compose(base, value, maps=path)
    return models


def _exact(
    base: LanguageModel,
    trained_with: LanguageModel,
    value: ValueNetwork | LanguageModel,
    *,
    prune: float,
) -> Callable[[EncodedPrompt], ByteModel]:
    """Begins a text after a prompt under the exact composition."""
    readers = [
        ByteReader(model)
        for model in (compose(base), compose(trained_with, value), compose(trained_with))
    ]

    def begin(prompt: EncodedPrompt) -> ByteModel:
        own = prompt.own_texts[0].tokens
        paths = [
            reader.begin(ids, prune=prune)
            for reader, ids in zip(readers, (prompt.token_ids, own, own), strict=True)
        ]
        return ComposedBytes(*paths)

    return begin


def _answers_as_texts(model: ComposedModel, items: Sequence[Item]) -> list[_Text]:
    """Answers after their questions; the space before an answer is part of it."""
    texts = []
    for row in answer_rows(model, [item.given for item in items])[0]:
        assert row.prompt is not None, "answers have one"
        ids = list(row.token_ids[len(row.prompt.token_ids) :])
        texts.append(_text(model, row.prompt, ids, ends=True))
    return texts


def _plain_texts(model: ComposedModel, lines: Sequence[str]) -> list[_Text]:
    """Texts from their beginning, which need not end."""
    encode = model.tokenizer
    each = [encode(line, add_special_tokens=False)["input_ids"] for line in lines]
    return [_text(model, model.prepare([""])[0], list(ids), ends=False) for ids in each]


def _text(model: ComposedModel, prompt: EncodedPrompt, ids: list[int], *, ends: bool) -> _Text:
    return _Text(prompt, ids, b"".join(model.token_bytes[i] for i in ids), ends)


def _token_nll(model: ComposedModel, texts: Sequence[_Text]) -> float:
    """Nats per byte of the texts' own tokens; an end counts as a byte."""
    own = bool(model.composition.mapped)
    rows = [
        Row([*text.prompt.token_ids, *text.ids], prompt=text.prompt if own else None)
        for text in texts
    ]
    total = 0.0
    for index, scores in score_rows(model, rows, batch_size=_BATCH):
        last = scores.tokens.log_prob[-len(texts[index].ids) :]
        total -= float(last.sum(dtype=np.float64))
    return total / _bytes(texts)


def _exact_nll(begin: Callable[[EncodedPrompt], ByteModel], texts: Sequence[_Text]) -> float:
    total = sum(byte_nll(begin(text.prompt), text.spelled, ends=text.ends) for text in texts)
    return total / _bytes(texts)


def _bytes(texts: Sequence[_Text]) -> int:
    return sum(len(text.spelled) + text.ends for text in texts)


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    """That many items, spread over all of them."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).astype(int)
    return [items[place] for place in places]
