"""Continuations of ToxiGen's prompts, to be classified by another program.

In: a composed model, files of prompts. Out: one line per prompt, with the group it is about.

The protocol is that of the paper's authors: a sample of prompts for each group, "Complete the
following: " before each in a chat, greedy, up to an empty line. Their sample depends on the order
in which the files are listed; ours only on the seed and the file's name.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from ivl_jax.config import ConfigError, GenerationOptions, model_problems
from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import remote_problem
from ivl_jax.data.formats import Message
from ivl_jax.evaluation.flags import ModelFlags, require

if TYPE_CHECKING:
    from ivl_jax.decoding.prompt_files import PromptRow

_INSTRUCTION = "Complete the following: "
_END = "\n\n"


@dataclass(frozen=True)
class Flags:
    """Continuations of ToxiGen's prompts; does not classify them."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    prompts: tuple[str, ...] = ()
    """Text files with one prompt per line, named `LABEL_GROUP….txt` like ToxiGen's."""
    output: str = ""
    """JSONL file, one line per prompt, written prompt by prompt; a second run resumes."""
    prompt: Literal["chat", "text"] = "chat"
    """`chat`: "Complete the following: …" in the chat template, like the authors; `text`: the bare
    prompt."""
    per_group: int = 500
    """The most prompts to sample from each file; 0: all."""
    seed: int = 42
    """Seed of the sample."""
    max_new_tokens: int = 512
    """The most tokens per continuation."""
    batch_size: int = 8
    """Prompts continued together."""


def run(flags: Flags) -> None:
    """Generate the continuations.

    Args:
        flags: of the command line.

    Raises:
        ConfigError: flags or files are invalid, or the output was written with other settings.
        ValueError: prompts exceed the context, or the models do not fit each other.
    """
    # Imported here: JAX takes a second, which --help should not wait for.
    from ivl_jax.decoding.prompt_files import GenerationFile
    from ivl_jax.evaluation.generation import generate_to_file
    from ivl_jax.evaluation.loading import chat_format_of, find_sources, load_model

    problems = model_problems(flags.model.composed)
    if not flags.prompts:
        problems.append("--prompts is missing: name ToxiGen's files, such as hate_women_1k.txt")
    if not flags.output.endswith(".jsonl"):
        problems.append("--output is missing: name a .jsonl file")
    if problem := remote_problem("--output", flags.output):
        problems.append(problem)
    require(problems)
    rows = draw_prompts(
        [Path(name) for name in flags.prompts], per_group=flags.per_group, seed=flags.seed
    )
    sources = find_sources(flags.model)
    settings = sources.to_json() | {
        name: getattr(flags, name) for name in ("prompt", "per_group", "seed", "max_new_tokens")
    }
    chat = chat_format_of(sources)
    chats = flags.prompt == "chat"
    options = GenerationOptions(
        max_new_tokens=flags.max_new_tokens, stop=(_END,), stop_ids=chat.stop_ids if chats else ()
    )
    prompts: list[Any] = [row.record["prompt"] for row in rows]
    if chats:
        dialogues = [[Message("user", _INSTRUCTION + prompt)] for prompt in prompts]
        prompts = [chat.encode_prompt(dialogue).tolist() for dialogue in dialogues]
    prepared = sources.prompts.prepare(prompts, options, names=[row.where for row in rows])
    output = GenerationFile(Path(flags.output), settings=settings, rows=rows)
    generate_to_file(load_model(sources), prepared, output, batch_size=flags.batch_size)
    Console().print(f"ToxiGen: {len(rows)} continuations in {flags.output}; classify their `text`")


def draw_prompts(paths: Sequence[Path], *, per_group: int, seed: int) -> "list[PromptRow]":
    """Sample prompts from files with one prompt per line.

    Args:
        paths: files named `LABEL_GROUP.txt` or `LABEL_GROUP_….txt`, such as `hate_women_1k.txt`.
        per_group: the most prompts per file; 0: all.
        seed: of the sample.

    Returns:
        Rows with `prompt`, `label` and `group`, in the given order of files and in file order.

    Raises:
        ConfigError: a file is missing, has no prompts, or has no label and group in its name.
    """
    from ivl_jax.decoding.prompt_files import PromptRow

    rows = []
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"--prompts: no file at {path}")
        label, separator, group = path.name.split(".")[0].partition("_")
        if not separator:
            raise ConfigError(
                f"--prompts: {path}: expected a name with label and group, such as "
                "hate_women_1k.txt"
            )
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        prompts = [(number, line.strip()) for number, line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"--prompts: {path} has no prompts")
        if 0 < per_group < len(prompts):
            drawn = random.Random(f"{seed} {path.name}").sample(prompts, per_group)
            prompts = sorted(drawn)
        for number, prompt in prompts:
            # The files escape line breaks and backslashes.
            text = prompt.replace("\\\\", "\\").replace("\\n", "\n")
            record = {"prompt": text, "label": label, "group": group.removesuffix("_1k")}
            rows.append(PromptRow(f"{path}:{number}", record, text, ()))
    return rows
