"""`python -m tests.fuzz --inputs N --seed S [READER…]`: feed altered files to readers.

In: a command line. Out: a line for each reader, and the first faults of each kind; status 1 if any.
"""

import argparse
import logging
import sys
import warnings

from tests.fuzz.readers import READERS
from tests.fuzz.trial import run_trial


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--inputs", type=int, default=1000, help="altered files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    failed = False
    for name in chosen.readers or READERS:
        trial = run_trial(name, inputs=chosen.inputs, seed=chosen.seed)
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(trial.outcomes.items()))
        sys.stdout.write(f"{name:24} {counts}; the slowest took {trial.slowest:.2f} s\n")
        shown = set()
        for fault in trial.faults:
            kind = " ".join(fault.what.split()[:3]) + fault.trace[-300:-150]
            if kind not in shown and len(shown) < 20:
                shown.add(kind)
                sys.stdout.write(f"  input {fault.number}: {fault.what}\n")
                sys.stdout.write(f"    {fault.content[:300]!r}\n")
                sys.stdout.write(
                    "".join(f"    {line[:240]}\n" for line in fault.trace.splitlines()[-7:])
                )
        sys.stdout.flush()
        failed |= bool(trial.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
