"""Command line: run a benchmark on a base with value networks on top.

    python -m ivl_jax.evaluation likelihood --base BASE --value VALUE --data FILE…
    python -m ivl_jax.evaluation gsm8k --base BASE --value VALUE --data FILE --output OUT.jsonl
    python -m ivl_jax.evaluation lm-eval run --model ivl --model_args base=BASE,value=VALUE \
        --tasks arc_easy,hellaswag

In: flags. Out: tables on the console, JSON and JSONL files.
"""

import importlib
import logging
import sys

from ivl_jax.command_line.flags import parse_subcommand
from ivl_jax.evaluation import flags as all_flags

# Name on the command line → flags, and the module whose `run` takes them.
_BENCHMARKS = {
    "likelihood": (all_flags.LikelihoodFlags, "likelihood"),
    "gsm8k": (all_flags.Gsm8kFlags, "gsm8k"),
    "mt-bench": (all_flags.MtBenchFlags, "mt_bench"),
    "toxigen": (all_flags.ToxigenFlags, "toxigen"),
}
_HARNESS = "lm-eval"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status; 2 where the input cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("ivl_jax").setLevel(logging.INFO)
    if arguments[:1] == [_HARNESS]:
        harness = importlib.import_module("ivl_jax.evaluation.harness_command")
        return harness.run(arguments[1:])
    chosen = parse_subcommand(
        {name: kind for name, (kind, _) in _BENCHMARKS.items()} | {_HARNESS: _lm_eval},
        arguments,
        prog="python -m ivl_jax.evaluation",
        description="Benchmarks of a base model with value networks on top.",
    )
    module = next(module for kind, module in _BENCHMARKS.values() if type(chosen) is kind)
    try:
        # Imported after the flags are read: JAX takes a second that --help need not wait for.
        importlib.import_module(f"ivl_jax.evaluation.{module}").run(chosen)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; with an --output of lines the same command goes on\n")
        return 130
    return 0


def _lm_eval() -> None:
    """Run lm-evaluation-harness with the model `ivl`; all that follows are its own flags."""


if __name__ == "__main__":
    sys.exit(main())
