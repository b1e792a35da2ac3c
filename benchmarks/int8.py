"""A base in int8 compared with the same base in float32: decoding, memory, and NLL.

Pair A has random weights, the family is the package's own. Out: rows; the peer of each is our own
float32.
"""

import functools

from benchmarks.composed import Weights, bytes_a_step, composed, random_weights
from benchmarks.decode_contest import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Contender,
    contest,
    random_prompts,
)
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import BASE_A, VALUE_A, parameter_count
from benchmarks.timing import Figures
from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.demonstrations import build_items, select
from ivl_jax.experiments.measure import response_nll
from ivl_jax.weights.language_model import load_language_model

ABOUT = "a base in int8 beside float32: speed, memory, and the change of NLL"

_BATCHES = (1, 8)
_FAMILY = ("S", "L")
_QUICK_ITEMS = 64


def run(options: Options) -> Report:
    """Decode with both bases in turn, and score held-out answers with both.

    Args:
        options: quick: batch 1, 32 new tokens, three repeats, 64 answers of S.

    Returns:
        The report.
    """
    new_tokens, repeats = (32, 3) if options.quick else (NEW_TOKENS, 7)
    base, value = random_weights(BASE_A, seed=0), random_weights(VALUE_A, seed=1)
    rows = []
    for batch in _BATCHES[:1] if options.quick else _BATCHES:
        rows += _speed_rows(base, value, batch, new_tokens=new_tokens, repeats=repeats)
    whole, rounded = (_megabytes(base, int8=int8) for int8 in (False, True))
    rows.append(
        Row("pair A: the base's parameters", Figures(rounded, 0.0), "MB", peer=Peer("f32", whole))
    )
    items = select(build_items(), "test")
    chosen = items[: _QUICK_ITEMS if options.quick else None]
    for model in _FAMILY[: 1 if options.quick else None]:
        loaded = load_language_model(family_folder(model))
        exact, near = (
            response_nll(compose(loaded, int8_base=int8), chosen) for int8 in (False, True)
        )
        rows.append(
            Row(
                f"{model}: change of the NLL, {len(chosen)} held-out answers",
                Figures(abs(near - exact), 0.0),
                "nats",
                target=Target("median", 0.01),
            )
        )
    shapes = {
        "base A": parameter_count(BASE_A),
        "value": parameter_count(VALUE_A),
        "prompt": PROMPT_TOKENS,
        "new tokens": new_tokens,
    }
    return Report(rows, dtype="float32; the base's kernels in int8", shapes=shapes)


def _speed_rows(
    base: Weights, value: Weights, batch: int, *, new_tokens: int, repeats: int
) -> list[Row]:
    prompts = random_prompts(batch, BASE_A.vocab_size)

    def contender(*, int8: bool) -> Contender:
        model = composed(base, value, int8_base=int8)
        return Contender(
            functools.partial(model.prefill, prompts, new_tokens), model.decode, repeats
        )

    outcomes, memory = contest(
        {"int8": contender(int8=True), "f32": contender(int8=False)},
        new_tokens=new_tokens,
        memory_around="int8",
    )
    slots = PROMPT_TOKENS + new_tokens / 2
    limit = memory.limit(outcomes["int8"], bytes_a_step([base, value], batch=batch, slots=slots))
    rate = outcomes["int8"].rate
    peer = Peer("f32", outcomes["f32"].rate.median)
    name = f"pair A, batch {batch}: composed decoding with an int8 base"
    first = batch == 1
    target = Target("ratio", 1.3) if first else None
    rows = [Row(name, rate, "tokens/s", "higher", peer=peer, target=target)]
    if first:
        beside = f"{name}, beside what memory can read of f32"
        past = Target("fraction_of_limit", 1.0)
        rows.append(Row(beside, rate, "tokens/s", "higher", limit=limit, target=past))
    return rows


def _megabytes(weights: Weights, *, int8: bool) -> float:
    import jax

    params = composed(weights, int8_base=int8).params.base
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
