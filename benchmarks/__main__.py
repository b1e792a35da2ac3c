"""Run benchmarks: `python -m benchmarks NAME…|all [--quick] [--json FILE]`.

In: names. Out: a table each, one JSON file for all. A benchmark is a module of this package with
`run(options: Options) -> Report`; its name and one line about it stand in `BENCHMARKS`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.report import Options, show, to_json, write_json
from benchmarks.setting import describe_setting

BENCHMARKS = {
    "vocabulary": "building vocabulary maps: time, coverage, size; the peer is a loop over cells",
    "decode": "composed decoding of one prompt beside PyTorch and the limit of memory",
    "batch": "composed decoding of 8 and 32 prompts at once beside PyTorch",
    "refill": "256 ragged requests: rows refilled as they end, beside static batches",
    "speculative": "speed with a draft against the share of its proposals kept; the peer is ours",
    "int8": "a base in int8 beside float32: speed, memory, and the change of NLL",
    "train": "the training step of pair A beside PyTorch in float32 and bfloat16",
    "memory": "peak temporaries of the step at a vocabulary of 128,256: logits in chunks and whole",
    "cached_states": "epochs from cached base states beside epochs that run the base",
    "load": "loading safetensors: speed and peak memory; the peer is safetensors with torch",
    "startup": "weights loaded until the first text, compile cache cold and warm; --help",
}

_WIDTH_OF_A_FILE = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a benchmark failed, not where a target is missed.

    Args:
        arguments: of the command line; None for this process' own.
    """
    options, names, path = _parse(arguments)
    # A pipe has no width; rich would take 80 columns and break every cell.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    reports, failures = {}, {}
    setting = describe_setting()
    record = {}
    for name in names:
        console.print(f"{name}: {BENCHMARKS[name]} …", soft_wrap=True)
        try:
            reports[name] = importlib.import_module(f"benchmarks.{name}").run(options)
            show(name, reports[name], console)
        except Exception as error:
            # The others' hours are not lost for one that fails.
            failures[name] = f"{type(error).__name__}: {error}"
            console.print_exception()
        record = to_json(reports, failures=failures, options=options, setting=setting)
        if path is not None:
            write_json(path, record)
    if path is not None:
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"targets met: {'yes' if record['targets_met'] else 'NO'}")
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> tuple[Options, list[str], Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure ivl_jax beside its peers and the machine's limits.",
        epilog="\n".join(f"{name}: {about}" for name, about in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and setting there")
    parsed = parser.parse_args(arguments)
    path: Path | None = parsed.json
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        parser.error(f"--json {path}: expected the name of a file in a folder that exists")
    names = list(BENCHMARKS) if "all" in parsed.names else list(dict.fromkeys(parsed.names))
    return Options(quick=parsed.quick), names, path


if __name__ == "__main__":
    sys.exit(main())
