"""The DPO step of pair A compared with the step on demonstrations, on the same tokens.

Weights and tokens are random; a row of 256 tokens holds the two answers of a pair. Out: rows in
milliseconds per step, with the base run in the step and with its states read from a cache.
"""

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import BASE_A, VALUE_A, parameter_count
from benchmarks.timing import Figures, time_in_turn
from benchmarks.training_steps import OurStep, Sizes
from ivl_jax.training.objectives.dpo import DPO
from ivl_jax.training.objectives.objective import Objective
from ivl_jax.training.objectives.sft import SFT

ABOUT = "the DPO step beside the SFT step on the same tokens"

SIZES = Sizes(rows=4, length=256)
# The networks run once in both; only the heads' chunks are passed twice.
_MOST = 1.4


def run(options: Options) -> Report:
    """Time both steps in turn, with the base and with cached states.

    Args:
        options: quick: two repeats instead of seven.

    Returns:
        The report.
    """
    kinds = {"": False, ", cached base states": True}
    objectives: dict[str, Objective] = {"DPO": DPO, "SFT": SFT}
    steps = {
        name + kind: OurStep(
            BASE_A, VALUE_A, SIZES, objective=objective, segments=2, cached_states=cached
        )
        for kind, cached in kinds.items()
        for name, objective in objectives.items()
    }
    timings = time_in_turn(steps, repeats=2 if options.quick else 7)
    found = {
        name: Figures.of(1e3 * each for each in timing.seconds) for name, timing in timings.items()
    }
    rows = [
        Row(
            f"DPO step{kind}",
            found[f"DPO{kind}"],
            "ms",
            peer=Peer(f"SFT step{kind}", found[f"SFT{kind}"].median),
            target=Target("ratio", 1 / _MOST),
        )
        for kind in kinds
    ]
    shapes = {
        "base": parameter_count(BASE_A),
        "value": parameter_count(VALUE_A),
        "batch": f"{SIZES.rows} × {SIZES.length}",
        "logits chunk": steps["DPO"].chunk_length,
    }
    return Report(rows, dtype="float32", shapes=shapes)
