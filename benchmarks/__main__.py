"""Run benchmarks: `python -m benchmarks NAME…|all [--quick] [--json FILE]`.

In: names. Out: one table each, and one JSON file for all. `benchmarks` describes how to write one.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.discovery import Benchmark, BenchmarkError, find_benchmarks, read_reference
from benchmarks.report import Options, show, to_json, write_json
from benchmarks.setting import describe_setting
from ivl_jax.command_line.guard import FAILED, describe_unexpected, run_command

_PROGRAM = "python -m benchmarks"
_WIDTH_OF_A_FILE = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 if a benchmark failed, but not if a target was missed.

    Args:
        arguments: of the command line; None: this process's.
    """
    return run_command(_PROGRAM, _run, arguments, failure_status=FAILED)


def _run(arguments: Sequence[str]) -> int:
    options, chosen, path = _parse(arguments)
    # A pipe has no width; rich would assume 80 columns and wrap every cell.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    reports, failures = {}, {}
    setting = describe_setting()
    record = {}
    for name, benchmark in chosen.items():
        console.print(f"{name}: {benchmark.about} …", soft_wrap=True)
        try:
            reports[name] = benchmark.load()(options)
            show(name, reports[name], console)
            for part, reason in reports[name].failed.items():
                failures[f"{name}, {part}"] = reason
                console.print(f"{name}, {part}: {reason}", style="red", markup=False)
            for part, reason in reports[name].skipped.items():
                console.print(f"{name}, {part}: skipped: {reason}", markup=False, soft_wrap=True)
        except Exception as error:
            # A failure does not discard the results of the others.
            failures[name] = f"{type(error).__name__}: {error}"
            said = describe_unexpected(error, program=_PROGRAM, arguments=arguments)
            console.print(f"{name}: {said}", style="red", markup=False, soft_wrap=True)
        record = to_json(reports, failures=failures, options=options, setting=setting)
        if path is not None:
            write_json(path, record)
    if path is not None:
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"targets met: {'yes' if record['targets_met'] else 'NO'}")
    return 1 if failures else 0


def _parse(
    arguments: Sequence[str],
) -> tuple[Options, dict[str, Benchmark], Path | None]:
    try:
        found = find_benchmarks()
    except BenchmarkError as error:
        raise SystemExit(f"{_PROGRAM}: {error}") from error
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Compare ivl_jax with its peers and the machine's limits.",
        epilog="\n".join(f"{name}: {one.about}" for name, one in found.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="see below, or all, or your own MODULE:FUNCTION"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and setting there")
    parsed = parser.parse_args(arguments)
    path: Path | None = parsed.json
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        parser.error(f"--json {path}: expected the name of a file in an existing folder")
    try:
        chosen = _choose(parsed.names, found)
    except BenchmarkError as error:
        parser.error(str(error))
    return Options(quick=parsed.quick), chosen, path


def _choose(names: Sequence[str], found: Mapping[str, Benchmark]) -> dict[str, Benchmark]:
    """The named benchmarks, each once, in the given order.

    Raises:
        BenchmarkError: there is no such benchmark.
    """
    chosen: dict[str, Benchmark] = {}
    for name in names:
        if name == "all":
            chosen |= found
        elif ":" in name:
            chosen[name] = read_reference(name)
        elif name in found:
            chosen[name] = found[name]
        else:
            known = ", ".join([*found, "all"])
            raise BenchmarkError(
                f"no benchmark {name!r}: choose from {known}, or give your own MODULE:FUNCTION"
            )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
