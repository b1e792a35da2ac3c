"""Command line: run an evaluation on a base with value networks.

    python -m ivl_jax.evaluation likelihood --base BASE --value VALUE --data FILE…
    python -m ivl_jax.evaluation gsm8k --base BASE --value VALUE --data FILE --output OUT.jsonl
    python -m ivl_jax.evaluation lm-eval run --model ivl --model_args base=BASE,value=VALUE \
        --tasks arc_easy,hellaswag
    python -m ivl_jax.evaluation my_package.my_module …

In: flags. Out: tables on the console, JSON and JSONL files.
"""

import importlib
import sys
from collections.abc import Sequence

from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.guard import WRONG_INPUT, run_command
from ivl_jax.evaluation.discovery import find_evaluations, import_evaluation

_PROGRAM = "python -m ivl_jax.evaluation"
_HARNESS = "lm-eval"
_RESUMES = "stopped; the same command resumes"
_WHEN_STOPPED = {
    **dict.fromkeys(("gsm8k", "mt-bench", "toxigen"), _RESUMES),
    **dict.fromkeys(("likelihood", "transfer"), "stopped; the same command starts anew"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: this process's.

    Returns:
        The exit status; 2 if the input is invalid.
    """
    name = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    return run_command(
        _PROGRAM, _run, arguments, when_stopped=lambda: _WHEN_STOPPED.get(name, "stopped")
    )


def _run(arguments: Sequence[str]) -> int:
    from ivl_jax.command_line.flags import parse_flags, parse_subcommand

    log_to_stderr()
    if arguments[:1] == [_HARNESS]:
        harness = importlib.import_module("ivl_jax.evaluation.harness_command")
        return harness.run(arguments[1:])
    name = arguments[0] if arguments else ""
    evaluations = find_evaluations()
    if "." in name:
        evaluations[name] = import_evaluation(name)
    if name in evaluations:
        chosen = evaluations[name]
        flags = parse_flags(chosen.flags, arguments[1:], prog=f"{_PROGRAM} {name}")
        chosen.run(flags)
        return 0
    kinds = {name: evaluation.flags for name, evaluation in evaluations.items()}
    parse_subcommand(
        {**kinds, _HARNESS: _lm_eval},
        arguments,
        prog=_PROGRAM,
        description="Evaluations of a base model with value networks.",
    )
    return WRONG_INPUT  # not reached: without a command's name, help or an error is shown


def _lm_eval() -> None:
    """Run lm-evaluation-harness with the model `ivl`; all further flags are the harness's."""


if __name__ == "__main__":
    sys.exit(main())
