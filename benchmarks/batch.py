"""Composed decoding of 8 and 32 prompts at once, compared with PyTorch.

Weights are random, and the same for every decoder. Out: rows for pair A, where a batch costs both
memory and compute.
"""

from collections.abc import Iterator

from benchmarks.composed import bytes_a_step, random_weights
from benchmarks.decode import ALONE, CACHED, CACHED_BF16, OURS, Plan, contenders_of
from benchmarks.decode_contest import NEW_TOKENS, PROMPT_TOKENS, contest, random_prompts
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import BASE_A, VALUE_A, parameter_count

ABOUT = "composed decoding of 8 and 32 prompts at once beside PyTorch"

# Batch → target speedup over PyTorch in float32.
TARGETS = {8: 1.8, 32: 1.5}


def run(options: Options) -> Report:
    """Decode batches with ours and both peers in turn.

    Args:
        options: quick: only batch 8, 32 new tokens, two repeats.

    Returns:
        The report; the figures for batch 1 are `decode`'s.
    """
    plan = Plan(32, 2, 0) if options.quick else Plan(NEW_TOKENS, 3, 0)
    batches = list(TARGETS)[: 1 if options.quick else None]
    rows = [row for batch in batches for row in _rows(batch, plan)]
    shapes = {
        "base A": parameter_count(BASE_A),
        "value": parameter_count(VALUE_A),
        "batches": batches,
        "prompt": PROMPT_TOKENS,
        "new tokens": plan.new_tokens,
    }
    return Report(rows, dtype="float32, and bfloat16 where the peer says so", shapes=shapes)


def _rows(batch: int, plan: Plan) -> Iterator[Row]:
    base, value = random_weights(BASE_A, seed=0), random_weights(VALUE_A, seed=1)
    contenders = contenders_of(base, value, random_prompts(batch, BASE_A.vocab_size), plan)
    outcomes, memory = contest(contenders, new_tokens=plan.new_tokens, memory_around=OURS)
    slots = PROMPT_TOKENS + plan.new_tokens / 2
    limit = memory.limit(outcomes[OURS], bytes_a_step([base, value], batch=batch, slots=slots))
    # In bfloat16 this processor multiplies matrices at twice our float32 rate, so 1.0 is the goal.
    for peer, bound in ((CACHED, TARGETS[batch]), (CACHED_BF16, None)):
        yield Row(
            f"batch {batch}: composed decoding",
            outcomes[OURS].rate,
            "tokens/s",
            "higher",
            peer=Peer(peer, outcomes[peer].rate.median),
            limit=limit,
            target=None if bound is None else Target("ratio", bound),
        )
    yield Row(f"batch {batch}: the base alone", outcomes[ALONE].rate, "tokens/s", "higher")
