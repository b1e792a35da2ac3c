"""Dialogues that a chat model writes itself, for the distillation of a smaller one on them.

In: the model, questions. Out: a JSONL file of dialogues in `messages` format. In some the model
also invents the question: it continues the beginning of a user's turn. Every line is kept as soon
as it is generated, so that an interrupted run resumes.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivl_jax.config import GenerationOptions
from ivl_jax.data.formats import Message
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompt_files import GenerationFile, PromptRow
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.evaluation.generation import generate_to_file
from ivl_jax.paths import write_atomically

logger = logging.getLogger(__name__)

# No text has it; the template's text before it begins a user's turn.
_PLACE = "\x00"


class Writing(NamedTuple):
    """How the dialogues are sampled."""

    invented: int
    """Dialogues whose question the model invents."""
    max_new_tokens: int
    """The most tokens of a turn."""
    temperature: float
    seed: int = 0
    batch_size: int = 32
    """Turns written together."""


def write_dialogues(
    model: ComposedModel, questions: Sequence[str], folder: Path, writing: Writing
) -> Path:
    """Write dialogues, unless already done; an interrupted run resumes.

    Args:
        model: The writer.
        questions: Of the dialogues whose question is given.
        folder: For the files of both turns, and the dialogues once all are written.
        writing: How they are sampled.

    Returns:
        `dialogues.jsonl`: rows of `messages` and `group`, the question; without those whose
        question or answer is empty.

    Raises:
        ConfigError: The folder's files were made with other settings or questions.
        GenerationError: A text ended with an error.
    """
    dialogues = folder / "dialogues.jsonl"
    if dialogues.exists():
        return dialogues
    begun = turn_beginning(model)
    rows = [
        PromptRow(f"question {index}", {"prompt": begun}, begun, ())
        for index in range(writing.invented)
    ]
    invented = _generate(model, rows, [begun] * len(rows), folder / "questions.jsonl", writing)
    asked = [text for text in invented if text] + list(questions)
    rows = [
        PromptRow(f"answer {index}", {"prompt": question}, question, ())
        for index, question in enumerate(asked)
    ]
    prompts = [(Message("user", question),) for question in asked]
    answers = _generate(model, rows, prompts, folder / "answers.jsonl", writing)
    lines = [
        json.dumps(_dialogue(question, answer), ensure_ascii=False) + "\n"
        for question, answer in zip(asked, answers, strict=True)
        if answer
    ]
    write_atomically(dialogues, "".join(lines).encode())
    return dialogues


def turn_beginning(model: ComposedModel) -> str:
    """The text of a dialogue up to where the user's first message begins.

    Args:
        model: Its chat template counts.

    Returns:
        What the template puts before a first user message.
    """
    return model.chat_format.prompt_text([Message("user", _PLACE)]).split(_PLACE)[0]


def _generate(
    model: ComposedModel, rows: list[PromptRow], prompts: list[Any], file: Path, writing: Writing
) -> list[str]:
    """The texts of a file, without the space around them; those that are missing are generated."""
    options = GenerationOptions(
        max_new_tokens=writing.max_new_tokens,
        temperature=writing.temperature,
        seed=writing.seed,
        stop_ids=model.chat_format.stop_ids,
    )
    prepared: list[EncodedPrompt] = model.prepare(prompts, options) if prompts else []
    settings = writing._asdict()
    del settings["batch_size"]  # changes no more than rounding does
    output = GenerationFile(file, settings=settings, rows=rows)
    generate_to_file(model, prepared, output, batch_size=writing.batch_size)
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if rows else []
    return [json.loads(line)["text"].strip() for line in lines]


def _dialogue(question: str, answer: str) -> dict[str, Any]:
    messages = [Message("user", question), Message("assistant", answer)]
    return {"messages": [message._asdict() for message in messages], "group": question}
