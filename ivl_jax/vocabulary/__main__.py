"""Command line: build a vocabulary map, show what one covers, or check what it will not transfer.

    python -m ivl_jax.vocabulary build --base-tokenizer DIR --value-tokenizer DIR --text FILE… \
        --output MAP.safetensors [--method dtw|bytes|projection]
    python -m ivl_jax.vocabulary show MAP.safetensors
    python -m ivl_jax.vocabulary check MAP.safetensors --base-tokenizer DIR --value-tokenizer DIR \
        [--text FILE…] [--json]

In: two tokenizer folders and text files, or a map. Out: the map's file and a report on the console.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.flags import parse_subcommand
from ivl_jax.command_line.guard import FAILED, run_command
from ivl_jax.paths import is_local, usable_path

if TYPE_CHECKING:
    from ivl_jax.vocabulary.alignment import BuiltMap, NamedTokenizer

_PROGRAM = "python -m ivl_jax.vocabulary"


def build(
    *,
    base_tokenizer: Path,
    value_tokenizer: Path,
    text: tuple[Path, ...],
    output: str,
    method: Literal["dtw", "bytes", "projection"] = "dtw",
    entries: int = 4,
    centred: bool = False,
    pair: tuple[str, ...] = (),
) -> None:
    """Build a vocabulary map from running text and write it as a safetensors file.

    Args:
        base_tokenizer: Folder with the base's tokenizer (a model's folder also works).
        value_tokenizer: Folder with the value network's tokenizer.
        text: Files of running text: .jsonl or .json rows (all string fields, or dialogues), or
            plain text; ideally the kind of text that the models will read and write.
        output: Where to write the map, a .safetensors file, local or a gs:// URL; an existing one
            is replaced.
        method: dtw: the authors' dynamic time warping with edit distance; bytes: alignment by byte
            offsets, many times faster; projection: the same, but each base token takes its logit
            from several value tokens, whose weights sum to 1.
        entries: Value tokens per base token, at most; projection only.
        centred: Record in the map that value logits should be centred over the mapped tokens before
            they are mapped.
        pair: Special tokens to pair by hand, each BASE_TOKEN=VALUE_TOKEN, where pairing by role
            (begin, end, turn end, same name) is not what you want.
    """
    from ivl_jax.vocabulary.alignment import build_vocabulary_map
    from ivl_jax.vocabulary.mapping import coverage_problem, save_vocabulary_map
    from ivl_jax.vocabulary.texts import MAX_TEXT_BYTES, read_texts

    path = usable_path(output)
    if path.suffix != ".safetensors" or (is_local(path) and not path.parent.is_dir()):
        raise ValueError(
            f"--output {output}: expected the name of a .safetensors file in an existing folder"
        )
    if entries < 1:
        raise ValueError(f"--entries {entries}: expected at least 1 value token per base token")
    texts, cut = read_texts(text)
    base = _tokenizer("--base-tokenizer", base_tokenizer)
    value = _tokenizer("--value-tokenizer", value_tokenizer)
    console = Console(highlight=False)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        names = (f"tokenise: {base.name}", f"tokenise: {value.name}", "align")
        tasks = [bars.add_task(escape(name), total=len(texts)) for name in names]
        built = build_vocabulary_map(
            base,
            value,
            texts,
            method=method,
            centred=centred,
            entries=entries,
            pairs_by_hand=pair,
            progress=lambda stage, done: bars.advance(tasks[stage], done),
        )
    if not built.coverage.text:
        raise ValueError(
            f"no token of the text in {', '.join(map(str, text))} is mapped from {base.name} to "
            f"{value.name}: the map would change nothing, so it is not written; is the text of the "
            "kind that both tokenizers read?"
        )
    save_vocabulary_map(path, built.vocabulary_map, built.metadata)
    if cut:
        console.print(f"{cut:,} texts were longer than {MAX_TEXT_BYTES:,} bytes and were split")
    _report(console, built, base, value, len(texts))
    if (problem := coverage_problem(built.metadata)) is not None:
        logging.getLogger(__name__).warning(problem)
    console.print(f"wrote {escape(output)} ({path.stat().length / 1e6:.2f} MB)")


def show(map_file: Annotated[str, tyro.conf.Positional], /) -> None:
    """Show where a vocabulary map comes from and what it covers.

    Args:
        map_file: A file written by build, local or a gs:// URL.
    """
    from ivl_jax.vocabulary.mapping import load_vocabulary_map

    vocabulary_map, metadata = load_vocabulary_map(map_file)
    console = Console(highlight=False)
    rows, *entries = vocabulary_map.weight.shape
    several = f", at most {entries[0]} value tokens per base token" if entries else ""
    for name, value in (
        (
            "base tokenizer",
            f"{metadata.base_name} ({metadata.base_fingerprint[:12]}), {rows:,} ids",
        ),
        (
            "value tokenizer",
            f"{metadata.value_name} ({metadata.value_fingerprint[:12]}), "
            f"{metadata.value_vocab_size:,} ids",
        ),
        ("method", f"{metadata.method}{several}, on {metadata.texts:,} texts"),
        ("value logits centred", "yes" if metadata.centred else "no"),
        ("base tokens mapped", f"{metadata.token_coverage:.2%}"),
        ("running text mapped", f"{metadata.text_coverage:.2%}"),
        (
            "paired by role",
            ", ".join(f"{role}: {b} → {v}" for role, b, v in metadata.special_pairs) or "nothing",
        ),
    ):
        console.print(f"{name:22}{escape(value)}", soft_wrap=True)


def check(
    map_file: Annotated[str, tyro.conf.Positional],
    /,
    *,
    base_tokenizer: Path,
    value_tokenizer: Path,
    text: tuple[Path, ...] = (),
    json: bool = False,
) -> None:
    """Show what a vocabulary map will not transfer: by kind of text, with examples and a verdict.

    Args:
        map_file: A file written by build, local or a gs:// URL.
        base_tokenizer: Folder with the base's tokenizer, which the map was built for.
        value_tokenizer: Folder with the value network's tokenizer.
        text: Files of running text, as for build; none: a few built-in lines of prose, digits,
            code, white space and Chinese, Japanese and Korean.
        json: Print the report as JSON.
    """
    from ivl_jax.vocabulary.mapping import check_vocabulary_map, load_vocabulary_map
    from ivl_jax.vocabulary.samples import SAMPLE_TEXTS
    from ivl_jax.vocabulary.texts import read_texts
    from ivl_jax.vocabulary.transfer_check import check_transfer
    from ivl_jax.vocabulary.transfer_table import show_transfer

    vocabulary_map, metadata = load_vocabulary_map(map_file)
    texts = read_texts(text)[0] if text else [one for kind in SAMPLE_TEXTS.values() for one in kind]
    base = _tokenizer("--base-tokenizer", base_tokenizer)
    value = _tokenizer("--value-tokenizer", value_tokenizer)
    check_vocabulary_map(
        metadata,
        path=map_file,
        base_name=str(base_tokenizer),
        base_fingerprint=base.info.fingerprint,
        value_name=str(value_tokenizer),
        value_fingerprint=value.info.fingerprint,
    )
    report = check_transfer(vocabulary_map, metadata, base, value, texts)
    if not report.kinds:
        raise ValueError(
            f"{base.name} and {value.name} do not decode to the same bytes for any of the "
            f"{len(texts)} texts (one of them normalises the text before splitting it), so where "
            "their tokens begin cannot be compared"
        )
    console = Console(highlight=False)
    if json:
        console.print_json(data={"map": map_file, **report.to_json()})
    else:
        show_transfer(report, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status; 1 where the input cannot be used.
    """
    return run_command(_PROGRAM, _run, arguments, failure_status=FAILED)


def _run(arguments: Sequence[str]) -> None:
    log_to_stderr()
    parse_subcommand(
        {"build": build, "show": show, "check": check},
        arguments,
        prog=_PROGRAM,
        description="Vocabulary maps between two tokenizers.",
    )


def _tokenizer(option: str, folder: Path) -> "NamedTokenizer":
    """Load a tokenizer; any error names the option and the folder."""
    from ivl_jax.tokenizer import load_tokenizer
    from ivl_jax.vocabulary.alignment import named_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
        return named_tokenizer(folder.resolve().name, tokenizer, str(folder))
    except Exception as error:
        # The tokenizers library raises bare Exception for a file it cannot parse.
        raise ValueError(f"{option} {folder}: cannot read a tokenizer there: {error}") from error


def _report(
    console: Console, built: "BuiltMap", base: "NamedTokenizer", value: "NamedTokenizer", texts: int
) -> None:
    """Print what a new map covers."""
    from ivl_jax.vocabulary.transfer_check import readable

    def line(name: str, text: str) -> None:
        console.print(f"{name:22}{escape(text)}", soft_wrap=True)

    coverage = built.coverage
    mapped = round(coverage.tokens * base.info.vocab_size)
    line("base tokenizer", f"{base.name}, {base.info.vocab_size:,} ids")
    line("value tokenizer", f"{value.name}, {value.info.vocab_size:,} ids")
    line(
        "method",
        f"{built.metadata.method}; {texts:,} texts, {built.base_tokens:,} base tokens; "
        f"tokenised in {built.tokenise_seconds:.1f} s, aligned in {built.align_seconds:.1f} s",
    )
    if built.unequal_texts:
        line("left out", f"{len(built.unequal_texts):,} texts whose bytes a tokenizer changes")
    line("base tokens mapped", f"{mapped:,} ({coverage.tokens:.2%})")
    line(
        "running text mapped",
        f"{coverage.text:.2%} of its base tokens, with mean weight {coverage.mean_weight:.3f}",
    )
    pairs = [
        f"{readable(base.info, base_id)} → {readable(value.info, value_id)} ({role})"
        for role, base_id, value_id in built.metadata.special_pairs
    ]
    line("paired by role", ", ".join(pairs) or "nothing")
    seen = [f"{readable(base.info, i)} × {count:,}" for i, count in coverage.unmapped_in_text]
    line("unmapped, in text", "  ".join(seen) or "none")
    unseen = [readable(base.info, token_id) for token_id in coverage.unmapped_elsewhere]
    line("unmapped, not in text", "  ".join(unseen) + (" …" if unseen else "none"))


if __name__ == "__main__":
    sys.exit(main())
