"""Answers to MT-Bench's multi-turn questions, to be judged by another program.

In: a composed model, questions of several turns. Out: one line per question in the format that
FastChat's `gen_judgment.py` reads.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivl_jax.config import GenerationOptions, model_problems
from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import remote_problem
from ivl_jax.data.formats import Message
from ivl_jax.evaluation.flags import ModelFlags, require

if TYPE_CHECKING:
    from ivl_jax.data.chat import ChatFormat
    from ivl_jax.decoding.model import ComposedModel
    from ivl_jax.decoding.requests import EncodedPrompt

logger = logging.getLogger(__name__)

# FastChat's temperatures; other categories get 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7
_ADDED_FIELDS = ("answer_id", "model_id", "choices", "tstamp")
# What FastChat writes if a model cannot answer.
_NO_ANSWER = "ERROR"
_MOST_TURNS = 64  # turns that have sampling keys of their own


@dataclass(frozen=True)
class Flags:
    """Answers to multi-turn questions in FastChat's format; does not judge them."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    questions: str = ""
    """JSONL file of `question_id`, `category` and `turns`, as FastChat's `question.jsonl`."""
    output: str = ""
    """JSONL file of answers, one line per question; a second run resumes the first."""
    model_id: str = "ivl"
    """The model's name in the answers."""
    max_new_tokens: int = 1024
    """The most tokens per answer."""
    temperature: float | None = None
    """One temperature for all questions; by default each category's own."""
    seed: int = 0
    """Seed of sampling; question and turn are folded in."""
    batch_size: int = 8
    """Questions answered together."""


def run(flags: Flags) -> None:
    """Answer all questions.

    Args:
        flags: of the command line.

    Raises:
        ConfigError: flags or questions are invalid, or the output was written with other settings.
        PromptTooLongError: first turns exceed the context; names all, raised before any compute.
        GenerationError: an answer ended with an error.
        ValueError: the models do not fit each other.
    """
    # Imported here: JAX takes a second, which --help should not wait for.
    from ivl_jax.decoding.prompt_files import GenerationFile, PromptRow
    from ivl_jax.evaluation.generation import progress_bar, read_json_lines
    from ivl_jax.evaluation.loading import chat_format_of, find_sources, load_model

    problems = model_problems(flags.model.composed)
    if not flags.questions:
        problems.append("--questions is missing: name FastChat's question.jsonl, or one like it")
    if not flags.output.endswith(".jsonl"):
        problems.append("--output is missing: name a .jsonl file")
    if problem := remote_problem("--output", flags.output):
        problems.append(problem)
    require(problems)
    questions = read_json_lines(
        "--questions",
        Path(flags.questions),
        problem_of=_problem,
        expected='{"question_id": …, "category": …, "turns": ["…", …]}',
    )
    rows = [
        PromptRow(where, {"question_id": question["question_id"]}, None, ())
        for where, question in questions
    ]
    sources = find_sources(flags.model)
    settings = sources.to_json() | {
        "model_id": flags.model_id,
        "max_new_tokens": flags.max_new_tokens,
        "temperature": flags.temperature,
        "seed": flags.seed,
        "turns": [question["turns"] for _, question in questions],
    }
    chat = chat_format_of(sources)
    begun = [[Message("user", question["turns"][0])] for _, question in questions]
    sources.prompts.prepare(
        [chat.encode_prompt(messages).tolist() for messages in begun],
        names=[where for where, _ in questions],
    )
    output = GenerationFile(Path(flags.output), settings=settings, rows=rows, added=_ADDED_FIELDS)
    answerer = _Answerer(load_model(sources), chat, flags)
    if output.done:
        logger.info("%d of %d questions are answered already", output.done, len(questions))
    left = list(enumerate(question for _, question in questions))[output.done :]
    with output, progress_bar("answering") as progress:
        task = progress.add_task("", total=len(questions), completed=output.done)
        for start in range(0, len(left), flags.batch_size):
            batch = left[start : start + flags.batch_size]
            answers = answerer.answer(batch)
            output.append([_line(flags, *pair) for pair in zip(batch, answers, strict=True)])
            progress.update(task, completed=output.done)


class _Answerer:
    """Answers questions turn by turn, a batch of questions at a time."""

    def __init__(self, model: "ComposedModel", chat: "ChatFormat", flags: Flags) -> None:
        self._model = model
        self._chat = chat
        self._flags = flags

    def prompt(
        self, index: int, messages: Sequence[Message], question: dict[str, Any], *, name: str
    ) -> "EncodedPrompt":
        """Encode and check a dialogue; samples depend only on the question and the turn."""
        temperature = self._flags.temperature
        if temperature is None:
            temperature = TEMPERATURES.get(question["category"], _OTHER_TEMPERATURE)
        options = GenerationOptions(
            max_new_tokens=self._flags.max_new_tokens,
            temperature=temperature,
            seed=self._flags.seed,
            stop_ids=self._chat.stop_ids,
        )
        token_ids = self._chat.encode_prompt(messages).tolist()
        (prompt,) = self._model.prepare([token_ids], options, names=[name])
        return prompt._replace(sample_index=index * _MOST_TURNS + len(messages) // 2)

    def answer(self, batch: Sequence[tuple[int, dict[str, Any]]]) -> list[list[str]]:
        """Answer every turn of some questions."""
        from ivl_jax.decoding.requests import PromptTooLongError

        dialogues: list[list[Message]] = [[] for _ in batch]
        answers: list[list[str]] = [[] for _ in batch]
        for turn in range(max(len(question["turns"]) for _, question in batch)):
            prompts, asked, names = [], [], []
            for place, (index, question) in enumerate(batch):
                if turn >= len(question["turns"]):
                    continue
                name = f"question {question['question_id']}, turn {turn + 1}"
                dialogues[place].append(Message("user", question["turns"][turn]))
                try:
                    prompts.append(self.prompt(index, dialogues[place], question, name=name))
                    asked.append(place)
                    names.append(name)
                except PromptTooLongError as error:
                    logger.warning("%s; its answer is %s", error, _NO_ANSWER)
                    answers[place].append(_NO_ANSWER)
                    dialogues[place].append(Message("assistant", _NO_ANSWER))
            generations = self._model.generate_prepared(prompts, batch_size=len(batch))
            for place, name, generation in zip(asked, names, generations, strict=True):
                text = generation.text_of(name).strip()
                answers[place].append(text)
                dialogues[place].append(Message("assistant", text))
        return answers


def _line(
    flags: Flags, asked: tuple[int, dict[str, Any]], answers: Sequence[str]
) -> dict[str, Any]:
    """FastChat's record of an answer."""
    return {
        "answer_id": uuid.uuid4().hex[:22],
        "model_id": flags.model_id,
        "choices": [{"index": 0, "turns": list(answers)}],
        "tstamp": time.time(),
    }


def _problem(row: dict[str, Any]) -> str | None:
    if not isinstance(row.get("question_id"), int | str):
        return f"no `question_id`; the row has {sorted(row)}"
    if not isinstance(row.get("category"), str):
        return "no text `category`"
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        return "`turns` must be a non-empty list of texts"
    if len(turns) >= _MOST_TURNS:
        return f"{len(turns)} turns, but at most {_MOST_TURNS - 1} are supported"
    return None
