"""Held-out demonstrations of an evaluation, checked and tokenised before a weight is read.

In: the flags of the models and of the data. Out: the checked models, the dialogues in the base's
tokens, and the rows that are scored.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ivl_jax.config import ConfigError, RowsConfig, model_problems
from ivl_jax.config.checks import remote_problem
from ivl_jax.data.chat import ChatFormat
from ivl_jax.data.demonstrations import DemonstrationSource, store_demonstrations
from ivl_jax.data.formats import Demonstration
from ivl_jax.data.tokenized import TokenizedDemonstrations, tokenize_demonstrations
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.flags import ModelFlags, require
from ivl_jax.evaluation.loading import ModelSources, chat_format_of, find_sources
from ivl_jax.evaluation.scoring import Row


class HeldOut(NamedTuple):
    """What an evaluation of given answers needs, but for the weights."""

    sources: ModelSources
    chat: ChatFormat
    dialogues: TokenizedDemonstrations

    def write_report(
        self, path: str, benchmark: str, data: Sequence[str], figures: Mapping[str, Any]
    ) -> None:
        """Write a report's figures, and what they are of.

        Args:
            path: JSON file.
            benchmark: the evaluation's name.
            data: what the dialogues were read from.
            figures: of the report.
        """
        about = {
            "benchmark": benchmark,
            "model": self.sources.to_json(),
            "data": list(data),
            "chat_template": self.chat.name,
            "dialogues": self.dialogues.report.kept,
            "cut": self.dialogues.report.cut,
        }
        text = json.dumps({**about, **figures}, indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")


def read_held_out(
    model: ModelFlags,
    data: Sequence[str],
    *,
    rows: RowsConfig,
    max_length: int,
    limit: int,
    data_dir: str,
    outputs: Mapping[str, str],
    problems: Sequence[str] = (),
) -> HeldOut:
    """Check models and demonstrations, and tokenise the demonstrations.

    Args:
        model: the flags that name the models.
        data: JSON or JSONL files, or one `tfds:` source.
        rows: their format.
        max_length: the most tokens to read per dialogue; at most the models' context.
        limit: the number of demonstrations to read, spread over the files; 0: all.
        data_dir: where the ArrayRecord form of the demonstrations is stored.
        outputs: flag → the file it names, or an empty text; their folders are created.
        problems: what is wrong with the caller's own flags, reported with the rest.

    Returns:
        Models, chat format and dialogues.

    Raises:
        ConfigError: flags are missing or inconsistent.
        ValueError: demonstrations or models cannot be used.
    """
    found = [*model_problems(model.composed), *problems]
    found += [] if data else ["--data is missing: name files of demonstrations"]
    if model.composed.draft:
        found.append("--draft has no effect, since nothing is generated here: leave it out")
    found += [p for flag, path in outputs.items() if (p := remote_problem(flag, path))]
    require(found)
    for path in filter(None, outputs.values()):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    sources = find_sources(model)
    if any(sources.prompts.own_vocabularies) and model.chat_template:
        raise ConfigError(
            f"--chat-template {model.chat_template}: a value network with its own vocabulary "
            "reads dialogues only in its own template: leave the flag out"
        )
    chat = chat_format_of(sources)
    dialogues = tokenize_demonstrations(
        _read(data, rows, limit, data_dir),
        chat,
        sequence_length=min(max_length, sources.prompts.context),
        cache_dir=None,
        max_malformed_share=rows.max_malformed_fraction,
    )
    return HeldOut(sources, chat, dialogues)


def rows_of(model: ComposedModel, dialogues: TokenizedDemonstrations) -> list[Row]:
    """The rows to score: one per dialogue, whose prompt is read as in decoding.

    Args:
        model: the model that scores them.
        dialogues: in the base's tokens, in the model's own chat format if a value network has its
            own vocabulary; at most the context plus one tokens each.

    Returns:
        The rows, in the dialogues' order.
    """
    encoded = [dialogues[index].tokens.tolist() for index in range(len(dialogues))]
    if not model.composition.mapped:
        return [Row(tokens) for tokens in encoded]
    # Each dialogue up to the assistant's first turn, encoded as for decoding.
    prompts = []
    for row in dialogues.rows:
        messages = dialogues.demonstrations[int(row)].messages
        first = next(i for i, message in enumerate(messages) if message.role == "assistant")
        prompts.append(messages[:first])
    names = [dialogues.row_id(index) for index in range(len(dialogues))]
    prepared = model.prepare(prompts, names=names)
    return [Row(tokens, prompt=prompt) for tokens, prompt in zip(encoded, prepared, strict=True)]


def _read(
    data: Sequence[str], rows: RowsConfig, limit: int, data_dir: str
) -> Sequence[Demonstration]:
    """The demonstrations, stored once, as in training."""
    source = DemonstrationSource(
        train=tuple(data),
        row_format=rows.format,
        templates=rows.templates,
        validation_fraction=0.0,
    )
    stored = store_demonstrations(
        source, data_dir=data_dir, max_malformed_share=rows.max_malformed_fraction
    )
    split = stored.open("train")
    if not 0 < limit < len(split):
        return split
    # Spread over the file, whose beginning may not be representative.
    return [split[int(i)] for i in np.linspace(0, len(split) - 1, limit).astype(int)]
