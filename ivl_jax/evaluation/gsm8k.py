"""GSM8K with the protocol of the paper's authors: zero-shot, the last number is the answer.

In: a composed model, items of GSM8K. Out: one line per item, and the share of correct answers with
its 95 % Wilson interval.

The protocol, from the authors' released code: the user's message is "Answer the following
question." and the question; the assistant's turn begins with "Answer:"; greedy, 512 tokens; the
text is cut where the model starts a new question or comment; thousands separators are dropped; the
last number is the answer, and is correct if it equals the reference after punctuation is removed.
So signs are ignored (two references are negative), and 18.00 does not equal 18.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from ivl_jax.config import GenerationOptions, model_problems
from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import remote_problem
from ivl_jax.data.formats import Message
from ivl_jax.evaluation.flags import ModelFlags, require
from ivl_jax.evaluation.intervals import wilson_interval
from ivl_jax.rewards import is_right_number, last_number, reference_number

if TYPE_CHECKING:
    from ivl_jax.data.chat import ChatFormat

_INSTRUCTION = "Answer the following question."
_ANSWER = "Answer:"
# How a base model continues after its answer.
_ENDS = (_INSTRUCTION.removesuffix("."), "Question:", "Comment:")


@dataclass(frozen=True)
class Flags:
    """GSM8K as measured by the paper's authors: their prompt, greedy, the last number counts."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    data: str = ""
    """JSONL file of `question` and `answer` (`… #### N`)."""
    output: str = ""
    """JSONL file, one line per item, written item by item; a second run resumes where the first
    stopped. The summary is written next to it, with `.json` for `.jsonl`."""
    prompt: Literal["chat", "text"] = "chat"
    """`chat`: in the value network's chat template, like the authors; `text`: without one."""
    max_new_tokens: int = 512
    """The most tokens per answer."""
    limit: int = 0
    """Answer only the first items; 0: all."""
    batch_size: int = 8
    """Items answered together."""


def run(flags: Flags) -> dict[str, Any]:
    """Run the benchmark; write the lines and the summary, and print the score.

    Args:
        flags: of the command line.

    Returns:
        The summary.

    Raises:
        ConfigError: flags or items are invalid, or the output was written with other settings.
        FileNotFoundError: no such base model or value folder.
        ValueError: the models do not fit each other.
    """
    # Imported here: JAX takes a second, which --help should not wait for.
    from ivl_jax.decoding.prompt_files import GenerationFile, PromptRow
    from ivl_jax.evaluation.generation import generate_to_file, read_json_lines, write_summary
    from ivl_jax.evaluation.loading import chat_format_of, find_sources, load_model

    problems = model_problems(flags.model.composed)
    if not flags.data:
        problems.append("--data is missing: name GSM8K's test.jsonl")
    if not flags.output.endswith(".jsonl"):
        problems.append("--output is missing: name a .jsonl file")
    if problem := remote_problem("--output", flags.output):
        problems.append(problem)
    require(problems)
    items = read_json_lines(
        "--data",
        Path(flags.data),
        problem_of=_problem,
        expected='{"question": …, "answer": "… #### N"}',
    )
    items = items[: flags.limit or None]
    rows = [PromptRow(where, item, item["question"], ()) for where, item in items]
    sources = find_sources(flags.model)
    settings = sources.to_json() | {
        "prompt": flags.prompt,
        "max_new_tokens": flags.max_new_tokens,
        "limit": flags.limit,
    }
    chat = chat_format_of(sources)
    prompts = [
        _chat_prompt(chat, row) if flags.prompt == "chat" else f"{question(row)}\n{_ANSWER}"
        for _, row in items
    ]
    options = GenerationOptions(
        max_new_tokens=flags.max_new_tokens,
        stop=_ENDS,
        stop_ids=chat.stop_ids if flags.prompt == "chat" else (),
    )
    prepared = sources.prompts.prepare(prompts, options, names=[where for where, _ in items])
    output = GenerationFile(Path(flags.output), settings=settings, rows=rows)
    generate_to_file(
        load_model(sources),
        prepared,
        output,
        batch_size=flags.batch_size,
        judge=lambda index, text: {
            "number": last_number(text),
            "right": is_right_number(text, items[index][1]["answer"]),
        },
    )
    summary = {"benchmark": "gsm8k", **settings, **summarise(Path(flags.output))}
    write_summary(Path(flags.output).with_suffix(".json"), summary)
    low, high = summary["interval"]
    Console().print(
        f"GSM8K: {summary['right']} of {summary['items']} right, {summary['accuracy']:.1%} "
        f"(95 % Wilson interval {low:.1%} to {high:.1%})"
    )
    return summary


def question(row: dict[str, Any]) -> str:
    """The user's message for an item."""
    return f"{_INSTRUCTION}\n\nQuestion: {row['question'].strip()}"


def _chat_prompt(chat: "ChatFormat", row: dict[str, Any]) -> list[int]:
    """The prompt in a chat template; adds "Answer:" unless the template already ends with it."""
    messages = [Message("user", question(row))]
    begun = chat.prompt_text(messages).endswith(_ANSWER)
    return chat.encode_prompt(messages, begins="" if begun else _ANSWER).tolist()


def summarise(lines: Path) -> dict[str, Any]:
    """Score a complete file of lines.

    Args:
        lines: of `run`.

    Returns:
        Number of items, correct ones, their share, its 95 % Wilson interval, and how many answers
        reached the token limit.
    """
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").split("\n")[:-1]]
    right = sum(row["right"] for row in rows)
    return {
        "items": len(rows),
        "right": right,
        "accuracy": right / len(rows),
        "interval": wilson_interval(right, len(rows)),
        "interval_kind": "Wilson, 95 %",
        "cut_at_the_limit": sum(row["finish_reason"] == "length" for row in rows),
    }


def _problem(row: dict[str, Any]) -> str | None:
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            return f"no text `{name}`; the row has {sorted(row)}"
    if last_number(reference_number(row["answer"])) is None or "####" not in row["answer"]:
        return "the answer has no number after `####`"
    return None
