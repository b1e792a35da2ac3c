"""Held-out demonstrations of an evaluation, checked and tokenised before a weight is read.

In: the flags of the models and of the data. Out: the checked models, the dialogues in the base's
tokens, and the rows that are scored.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from rich.console import Console

from ivl_jax.config import ConfigError, RowsConfig, model_problems
from ivl_jax.data.chat import EncodedDialogue
from ivl_jax.data.demonstrations import (
    DemonstrationSource,
    SettingNames,
    StoredDemonstrations,
    store_demonstrations,
)
from ivl_jax.data.formats import Demonstration, Message, find_format
from ivl_jax.data.tokenized import TokenizedDemonstrations, tokenize_demonstrations
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompts import PromptReader
from ivl_jax.decoding.requests import PromptTooLongError
from ivl_jax.evaluation.flags import ModelFlags, require
from ivl_jax.evaluation.loading import ModelSources, chat_format_of, find_sources
from ivl_jax.evaluation.outputs import make_folders, output_problems
from ivl_jax.evaluation.scoring import Row
from ivl_jax.json_files import write_json
from ivl_jax.vocabulary.retokenize import RetokenizedText

_LOGGER = logging.getLogger(__name__)
_FLAGS = SettingNames(
    source="--data",
    row_format="--format",
    templates="--user-template and --assistant-template",
    max_malformed="--max-malformed-fraction",
    max_length="--max-length",
)


class HeldOut(NamedTuple):
    """What an evaluation of given answers needs, but for the weights."""

    sources: ModelSources
    dialogues: TokenizedDemonstrations
    settings: dict[str, Any]
    """What the dialogues were read from, and how."""
    malformed: int
    """Rows that are not dialogues, or that the chat template cannot render."""

    @property
    def row_counts(self) -> dict[str, int]:
        """What became of the rows."""
        report = self.dialogues.report
        return {
            "dialogues": report.kept,
            "repeated": report.kept - len(np.unique(first_copies(self.dialogues))),
            "malformed": self.malformed,
            "dropped": report.dropped,
            "cut": report.cut,
        }

    def show_rows(self, console: Console) -> None:
        """Print what became of rows that do not count as they are; nothing if all do."""
        said = {
            "repeated": "that repeat an earlier dialogue",
            "malformed": "malformed, left out",
            "dropped": "without an assistant's token within the limit, left out",
            "cut": "longer than the limit",
        }
        counts = self.row_counts
        if found := [f"{counts[name]} {what}" for name, what in said.items() if counts[name]]:
            console.print(f"Rows: {'; '.join(found)}.")

    def write_report(self, path: str, benchmark: str, figures: Mapping[str, Any]) -> None:
        """Write a report's figures, and what they are of.

        Args:
            path: JSON file; at every moment it has either the old report or the new one.
            benchmark: the evaluation's name.
            figures: of the report.
        """
        about = {"benchmark": benchmark, "model": self.sources.to_json()}
        write_json(path, {**about, **self.settings, **self.row_counts, **figures}, indent=2)


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

    Of preferences, the chosen dialogues are read. A dialogue that is too long for the base, or for
    a value network with its own vocabulary, is truncated.

    Args:
        model: the flags that name the models.
        data: JSON or JSONL files, or one `tfds:` source.
        rows: their format.
        max_length: the most tokens to read per dialogue; at most the models' context.
        limit: the number of demonstrations to read, spread over the files; 0: all.
        data_dir: where the ArrayRecord form of the demonstrations is stored.
        outputs: flag → the file it names, or an empty text; their folders are created. They
            must not be files that are read.
        problems: what is wrong with the caller's own flags, reported with the rest.

    Returns:
        Models and dialogues.

    Raises:
        ConfigError: flags are missing or inconsistent.
        ValueError: demonstrations or models cannot be used.
    """
    found = [*model_problems(model.composed), *problems]
    found += [] if data else ["--data is missing: name files of demonstrations"]
    if model.composed.draft:
        found.append("--draft has no effect, since nothing is generated here: leave it out")
    composed = model.composed
    read = {"--base": (composed.base,), "--value": composed.value, "--map": composed.map}
    inputs = [(flag, path) for flag, paths in {"--data": data, **read}.items() for path in paths]
    require([*found, *output_problems(outputs, inputs)])
    require(make_folders(outputs))
    sources = find_sources(model)
    if any(sources.prompts.own_vocabularies) and model.chat_template:
        raise ConfigError(
            f"--chat-template {model.chat_template}: a value network with its own vocabulary "
            "reads dialogues only in its own template: leave the flag out"
        )
    chat = chat_format_of(sources)
    stored, demonstrations = _read(data, rows, limit, data_dir)
    dialogues = tokenize_demonstrations(
        demonstrations,
        chat,
        sequence_length=min(max_length, sources.prompts.context),
        cache_dir=None,
        max_malformed_share=rows.max_malformed_fraction,
        names=_FLAGS,
    )
    malformed = stored.malformed_count + dialogues.report.malformed_count
    settings = {
        "data": list(data),
        "format": rows.format,
        "limit": limit,
        "max_length": max_length,
        "chat_template": chat.name,
    }
    dialogues = cut_to_own_vocabularies(dialogues, sources.prompts)
    return HeldOut(sources, dialogues, settings, malformed)


def first_copies(dialogues: TokenizedDemonstrations) -> Int64[np.ndarray, " N"]:
    """For each dialogue the index of the first one with the same tokens, often its own."""
    first: dict[bytes, int] = {}
    keys = [b"".join(part.tobytes() for part in dialogues[i]) for i in range(len(dialogues))]
    return np.asarray([first.setdefault(key, i) for i, key in enumerate(keys)], np.int64)


def cut_to_own_vocabularies(
    dialogues: TokenizedDemonstrations, prompts: PromptReader
) -> TokenizedDemonstrations:
    """Truncate dialogues to the contexts of value networks with their own vocabularies.

    Args:
        dialogues: in the base's tokens.
        prompts: reads them for every network.

    Returns:
        The dialogues, without those that have no target left; a warning counts both.

    Raises:
        ValueError: no dialogue has a target left.
    """
    if not any(prompts.own_vocabularies):
        return dialogues
    whole = [dialogues[index] for index in range(len(dialogues))]
    kept = [_fitting_tokens(dialogues, index, prompts) for index in range(len(dialogues))]
    cut = [EncodedDialogue(*(part[:end] for part in d)) for d, end in zip(whole, kept, strict=True)]
    shorter = [len(new.tokens) < len(old.tokens) for new, old in zip(cut, whole, strict=True)]
    if not any(shorter):
        return dialogues
    useful = [index for index, dialogue in enumerate(cut) if dialogue.loss_mask[1:].any()]
    names = " or ".join(own.name for own in prompts.own_vocabularies if own)
    if not useful:
        raise ValueError(
            f"--data: none of {len(whole)} dialogues has an assistant's token within the context "
            f"of {names}, in its own vocabulary: give shorter ones"
        )
    _LOGGER.warning(
        "%d of %d dialogues are longer than the context of %s, in its own vocabulary, and were "
        "truncated; %d of them have no assistant's token left and were left out",
        sum(shorter),
        len(whole),
        names,
        len(whole) - len(useful),
    )
    # Those that the base's limit had cut are counted already.
    newly = sum(
        short and len(old.tokens) <= dialogues.sequence_length
        for short, old in zip(shorter, whole, strict=True)
    )
    left, report = [cut[index] for index in useful], dialogues.report
    return dataclasses.replace(
        dialogues,
        tokens=np.concatenate([dialogue.tokens for dialogue in left]),
        loss_mask=np.concatenate([dialogue.loss_mask for dialogue in left]),
        starts=np.cumsum([0, *(len(dialogue.tokens) for dialogue in left)]),
        rows=dialogues.rows[useful],
        report=dataclasses.replace(
            report,
            kept=len(left),
            tokens=sum(len(dialogue.tokens) for dialogue in left),
            targets=sum(int(dialogue.loss_mask[1:].sum()) for dialogue in left),
            cut=report.cut + newly,
            dropped=report.dropped + len(whole) - len(left),
        ),
    )


def _fitting_tokens(dialogues: TokenizedDemonstrations, index: int, prompts: PromptReader) -> int:
    """How many of a dialogue's tokens every value network can read or predict."""
    tokens = dialogues[index].tokens.tolist()
    try:
        messages, name = _prompt_of(dialogues, index), dialogues.row_id(index)
        (prompt,) = prompts.prepare([messages], names=[name])
    except PromptTooLongError:
        return 0
    start, fitting = len(prompt.token_ids), len(tokens)
    for own, text in zip(filter(None, prompts.own_vocabularies), prompt.own_texts, strict=True):
        assert isinstance(text, RetokenizedText), "every network reads these"
        whole = text.fork()
        whole.push(tokens[start:-1])
        if len(whole.tokens) <= own.context:
            continue
        for place, token in enumerate(tokens[start:-1], start):
            text.push([token])
            if len(text.tokens) > own.context:
                # Those before it are read, and it is still predicted.
                fitting = min(fitting, place + 1)
                break
    return fitting


def _prompt_of(dialogues: TokenizedDemonstrations, index: int) -> tuple[Message, ...]:
    """A dialogue's messages up to the assistant's first turn."""
    messages = dialogues.demonstrations[int(dialogues.rows[index])].messages
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    return messages[:first]


def rows_of(model: ComposedModel, dialogues: TokenizedDemonstrations) -> list[Row]:
    """The rows to score: one per dialogue, whose prompt is read as in decoding.

    Args:
        model: the model that scores them.
        dialogues: in the base's tokens, in the model's own chat format if a value network has its
            own vocabulary; at most the context plus one tokens each.

    Returns:
        The rows, in the dialogues' order.
    """
    indices = range(len(dialogues))
    names = [dialogues.row_id(index) for index in indices]
    prompts: Sequence[Any] = [None] * len(dialogues)
    if model.composition.mapped:
        # Each dialogue up to the assistant's first turn, encoded as for decoding.
        prompts = model.prepare([_prompt_of(dialogues, index) for index in indices], names=names)
    return [
        Row(dialogues[index].tokens.tolist(), prompt=prompts[index], name=names[index])
        for index in indices
    ]


def _read(
    data: Sequence[str], rows: RowsConfig, limit: int, data_dir: str
) -> tuple[StoredDemonstrations, Sequence[Demonstration]]:
    """The demonstrations, stored once, as in training, and those of them that are read."""
    source = DemonstrationSource(
        train=tuple(data),
        row_format=rows.format,
        templates=rows.templates,
        validation_fraction=0.0,
    )
    stored = store_demonstrations(
        source,
        data_dir=data_dir,
        max_malformed_share=rows.max_malformed_fraction,
        names=_FLAGS,
    )
    split: Sequence[Demonstration] = stored.open("train")
    if 0 < limit < len(split):
        # Spread over the file, whose beginning may not be representative.
        split = [split[int(i)] for i in np.linspace(0, len(split) - 1, limit).astype(int)]
    if find_format(rows.format).read_rejected is not None:
        split = [each._replace(rejected=()) for each in split]
    return stored, split
