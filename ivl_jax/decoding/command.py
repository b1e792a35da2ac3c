"""What infer.py does once its flags are read: one prompt, a file of prompts, or a conversation.

In: an `InferConfig`. Out: text on standard output, or lines of a JSONL file.
"""

import dataclasses
import hashlib
import io
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ivl_jax.command_line.guard import StoppedBySignal
from ivl_jax.compilation_cache import describe_compiling, use_compilation_cache
from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.config import ConfigError, InferConfig, check_infer_config, config_to_mapping
from ivl_jax.data.formats import Message
from ivl_jax.decoding.generation import Generation, GenerationError
from ivl_jax.decoding.given_prompts import Prompt
from ivl_jax.decoding.loading import decoding_mesh, load_composed, read_sources
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompt_files import (
    GenerationFile,
    PromptRow,
    folder_fingerprint,
    read_prompts,
)
from ivl_jax.decoding.prompts import PromptReader, make_prompt_reader
from ivl_jax.decoding.requests import EncodedPrompt, PromptTooLongError
from ivl_jax.processes import joined_processes
from ivl_jax.profiling import StepProfile

logger = logging.getLogger(__name__)

# Flags that cannot change a text beyond near-ties; all others are compared when a run resumes.
_FREE_FLAGS = frozenset(
    {
        "prompt",
        "input",
        "output",
        "batch_size",
        "mesh",
        "base_layout",
        "value_layout",
        "profile",
        "compilation_cache",
        "distributed",
        "processes",
        "connection",  # the value folder names it
        "value_model",  # as its fingerprint
        "stop_ids",
    }
)


@dataclass(frozen=True)
class Work:
    """Everything decoding needs, read and checked.

    Attributes:
        config: The flags.
        model: The composed model.
        prompts: The prompts, encoded; empty in a conversation.
        output: Where generations go; None: standard output.
    """

    config: InferConfig
    model: ComposedModel
    prompts: list[EncodedPrompt]
    output: GenerationFile | None


@contextmanager
def joined(config: InferConfig) -> Iterator[None]:
    """Be one of several processes, with `--distributed`; around `prepare` and `decode`.

    Args:
        config: the flags.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    if not config.distributed:
        yield
        return
    again = "; finished lines are kept" if config.output is not None else ""
    with joined_processes(config.processes, remedy=f"run the same command again{again}"):
        yield


def prepare(config: InferConfig) -> Work | None:
    """Check flags and files and encode the prompts, then load the models.

    Args:
        config: the flags.

    Returns:
        What to decode, all checked; None where the output file is already complete.

    Raises:
        ConfigError: flags or an output file that do not fit; before any weight is read.
        FileNotFoundError: no such base model or value folder.
        ValueError: tokenizers or prompts that do not fit, also before; or weights.
    """
    check_infer_config(config)
    flags, values = config.model, len(config.model.values)
    rows = [] if config.input is None else read_prompts(Path(config.input), values=values)
    use_compilation_cache(config.runtime.compilation_cache)
    sources = read_sources(flags)
    mesh = decoding_mesh(flags.mesh, sources.base.arch)
    prompts = _encode(config, rows, make_prompt_reader(sources))
    if config.output is None:
        return Work(config, load_composed(sources, flags, mesh=mesh), prompts, None)
    with ExitStack() as opened:
        output = _open_output(config, sources, rows)
        opened.callback(output.close)
        if output.done == len(rows):
            logger.info("all %d prompts are done already", len(rows))
            return None
        model = load_composed(sources, flags, mesh=mesh)
        opened.pop_all()  # from here on the file is closed by `decode`
    return Work(config, model, prompts, output)


def _open_output(
    config: InferConfig, sources: ComposedSources, rows: Sequence[PromptRow]
) -> GenerationFile:
    """Open the output file; of several processes the first one writes it."""
    assert config.output is not None
    path, settings = Path(config.output), _settings(config, sources)
    output = GenerationFile(path, settings=settings, rows=rows, writes=jax.process_index() == 0)
    if jax.process_count() > 1:
        # The others may see the file later, or not at all.
        output.done = int(multihost_utils.broadcast_one_to_all(np.int32(output.done)))
    return output


def _encode(
    config: InferConfig, rows: Sequence[PromptRow], reader: PromptReader
) -> list[EncodedPrompt]:
    """Encode and check what is to be decoded; nothing in a conversation but its format."""
    if config.prompt is not None:
        text = _dialogue(config.prompt) if config.chat else config.prompt
        return reader.prepare([text], config.generation, names=["--prompt"])
    if config.input is None:
        _ = reader.chat_format
    return reader.prepare(
        [_prompt_of(row, chat=config.chat) for row in rows],
        [dataclasses.replace(config.generation, strengths=row.strengths) for row in rows],
        names=[row.where for row in rows],
    )


def decode(work: Work) -> None:
    """Decode what was prepared.

    Args:
        work: what `prepare` returned.

    Raises:
        GenerationError: texts ended with an error; what was generated has been written.
    """
    logger.info(describe_compiling())
    with StepProfile(work.config.profile, first_step=0, name="decode") as profile:
        if work.output is not None:
            _write_file(work, work.output, profile)
        elif work.prompts:
            _show(work, work.prompts[0], profile)
        else:
            _talk(work, profile)


def _settings(config: InferConfig, sources: ComposedSources) -> dict[str, Any]:
    """The settings that the texts of an output file depend on."""
    flags = config_to_mapping(config)
    settings = {name: value for name, value in flags.items() if name not in _FREE_FLAGS}
    draft, values = sources.draft, sources.values
    settings["base_fingerprint"] = folder_fingerprint(sources.base.folder)
    settings["draft_fingerprint"] = draft and folder_fingerprint(draft.folder)
    settings["value_fingerprints"] = [folder_fingerprint(value.folder) for value in values]
    settings["map_fingerprints"] = [
        hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
        for path in config.model.map
        if path != "none"
    ]
    return settings


def _dialogue(text: str) -> list[Message]:
    return [Message("user", text)]


def _prompt_of(row: PromptRow, *, chat: bool) -> Prompt:
    if row.text is None:
        return [Message(role, content) for role, content in row.messages]
    return _dialogue(row.text) if chat else row.text


def _write_file(work: Work, output: GenerationFile, profile: StepProfile) -> None:
    left = work.prompts[output.done :]
    if output.done:
        logger.info("%d of %d prompts are done already", output.done, len(work.prompts))
    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeRemainingColumn(),
    )
    first = jax.process_index() == 0
    bar = Progress(*columns, console=Console(stderr=True), disable=not first)
    with output, bar as progress:
        proposed = accepted = failed = 0
        task = progress.add_task("", total=len(work.prompts), completed=output.done)
        generations = work.model.generate_prepared(
            left, batch_size=work.config.batch_size, profile=profile
        )
        for generation in generations:
            output.append([generation.to_record()])
            failed += generation.error is not None
            proposed += generation.proposed_tokens
            accepted += generation.accepted_tokens
            progress.update(task, completed=output.done)
    _log_acceptance(work, proposed, accepted)
    if failed:
        raise GenerationError(
            f"{failed} of {len(left)} prompts ended with an error: see the field `error` of their "
            f"lines in {work.config.output}"
        )


def _show(work: Work, prompt: EncodedPrompt, profile: StepProfile) -> str:
    """Print pieces of text as they come; return the whole text."""
    start = time.perf_counter()
    first, generation = 0.0, None
    for piece in work.model.stream_prepared(prompt, profile=profile):
        first = first or time.perf_counter() - start
        if isinstance(piece, Generation):
            generation = piece
        else:
            _write(piece)
    assert generation is not None
    if not generation.text.endswith("\n"):
        _write("\n")
    rest = max(time.perf_counter() - start - first, 1e-9)
    logger.info(
        "%d tokens (%s): the first after %.2f s, then %.1f tokens/s, compiling included",
        len(generation.token_ids),
        generation.finish_reason,
        first,
        max(len(generation.token_ids) - 1, 0) / rest,
    )
    _log_acceptance(work, generation.proposed_tokens, generation.accepted_tokens)
    if generation.error is not None:
        raise GenerationError(generation.error)
    return generation.text


def _write(text: str) -> None:
    """Write a piece of text at once; of several processes the first one does."""
    if jax.process_index() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def _log_acceptance(work: Work, proposed: int, accepted: int) -> None:
    """Log how many of the tokens that a draft proposed were accepted; nothing without a draft."""
    if not work.config.model.draft:
        return
    if not proposed:
        logger.info("the draft: nothing was proposed, since it would not have paid")
        return
    share = 100 * accepted / proposed
    logger.info("the draft: %d of %d proposed tokens accepted (%.0f %%)", accepted, proposed, share)


def _read_message(*, interactive: bool) -> str | None:
    """The next line of standard input; None at its end, or after Ctrl-C."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None
    except StoppedBySignal:
        raise
    except KeyboardInterrupt:
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8: {error}") from error


def _talk(work: Work, profile: StepProfile) -> None:
    """Talk until the end of input, a line per message; Ctrl-C stops an answer."""
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # whose errors depend on the locale
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if interactive:
        sys.stdout.write("/reset starts a new conversation, /exit (or Ctrl-D) ends it\n")
    messages: list[Message] = []
    while (line := _read_message(interactive=interactive)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = []
            continue
        if not line:
            continue
        asked = [*messages, Message("user", line)]
        try:
            (prompt,) = work.model.prepare([asked], work.config.generation)
        except PromptTooLongError as error:
            if not interactive:
                raise
            logger.error("%s; /reset starts a new conversation", error)
            continue
        try:
            answer = _show(work, prompt, profile)
        except StoppedBySignal:
            raise
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        except GenerationError as error:
            if not interactive:
                raise
            logger.error("%s", error)
            continue
        messages = [*asked, Message("assistant", answer.strip())]
