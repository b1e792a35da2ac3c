"""`python -m ivl_jax.evaluation lm-eval …`: the harness's own command line, with the model `ivl`.

In: the harness's arguments. Out: its tables and files. The tasks in `tasks/` (pass@k from 20
samples) are included. Starting with the first release after 0.4.13, the harness finds `ivl` by
itself (entry point `lm_eval.models`), and `lm-eval run --model ivl` does the same.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

TASKS_FOLDER = Path(__file__).parent / "tasks"


def run(arguments: Sequence[str]) -> int:
    """Run the harness.

    Args:
        arguments: of its command line: `run --model ivl --model_args base=… --tasks …`, `ls`, ….

    Returns:
        The exit status; 2 if `--model_args` do not name a usable model, or without the harness.
    """
    if importlib.util.find_spec("lm_eval") is None:
        sys.stderr.write(
            "lm-evaluation-harness is not installed: pip install 'ivl_jax[eval]' (in a clone: "
            "pip install -e '.[eval]')\n"
        )
        return 2
    from lm_eval.__main__ import cli_evaluate

    from ivl_jax.evaluation.harness import ModelArgumentsError

    included = "--include_path" in arguments or arguments[:1] != ["run"]
    own_tasks = [] if included else ["--include_path", str(TASKS_FOLDER)]
    before = sys.argv
    sys.argv = ["lm-eval", *arguments, *own_tasks]  # the harness reads them there
    try:
        cli_evaluate()
    except ModelArgumentsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    finally:
        sys.argv = before
    return 0
