"""The training step of pair A, 4 × 256 tokens, compared with PyTorch and the fastest matmul.

Weights and tokens are random. Out: rows in tokens per second. All are timed alternately, so that a
busy machine slows all of them.
"""

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import thread_count
from benchmarks.shapes import BASE_A, VALUE_A, parameter_count
from benchmarks.timing import Figures, time_in_turn
from benchmarks.training_steps import OurStep, Sizes, matrix_product, model_flops, torch_train

ABOUT = "the training step of pair A beside PyTorch in float32 and bfloat16"

SIZES = Sizes(rows=4, length=256)
_MATRICES = (1024, 2048, 4096)  # the fastest product is the limit


def run(options: Options) -> Report:
    """Time our step, the peers' and the matrix products, in float32 and in bfloat16.

    Args:
        options: quick: one repeat instead of seven, no step with the penalty, one matrix product.

    Returns:
        The report.
    """
    threads = thread_count()
    ours, ours_bfloat16 = (OurStep(BASE_A, VALUE_A, SIZES, bfloat16=x) for x in (False, True))
    works = {
        "ivl_jax, float32": ours,
        "ivl_jax, bfloat16": ours_bfloat16,
        "torch_train, float32": torch_train(
            BASE_A, VALUE_A, SIZES, bfloat16=False, threads=threads
        ),
        "torch_train, bfloat16": torch_train(
            BASE_A, VALUE_A, SIZES, bfloat16=True, threads=threads
        ),
    }
    if not options.quick:
        works["ivl_jax, float32, L1 penalty"] = OurStep(BASE_A, VALUE_A, SIZES, penalty="l1")
    matrices = _MATRICES[1:2] if options.quick else _MATRICES
    products = {f"matmul {size}": matrix_product(size) for size in matrices}
    timings = time_in_turn({**works, **products}, repeats=1 if options.quick else 7)
    rates = {name: timings[name].rate(SIZES.tokens) for name in works}
    speeds = {size: timings[f"matmul {size}"].rate(2 * size**3) for size in matrices}
    limit_size, largest = max(speeds.items(), key=lambda item: item[1].median)
    flops = model_flops(BASE_A, VALUE_A, SIZES, base_runs=True)
    limit = largest.median / flops * SIZES.tokens

    def row(name: str, peer: str | None = None, target: Target | None = None) -> Row:
        return Row(
            f"{name} beside {peer}" if peer else name,
            rates[name],
            "tokens/s",
            better="higher",
            peer=Peer(peer, rates[peer].median) if peer else None,
            limit=limit,
            target=target,
        )

    rows = [
        row("ivl_jax, float32", target=Target("fraction_of_limit", 0.5)),
        row("ivl_jax, float32", "torch_train, float32", Target("ratio", 1.8)),
        row("ivl_jax, float32", "torch_train, bfloat16", Target("ratio", 1.0)),
        row("ivl_jax, bfloat16", "torch_train, bfloat16"),
        row("ivl_jax, bfloat16", "torch_train, float32"),
        *(row(name) for name in works if name not in ("ivl_jax, float32", "ivl_jax, bfloat16")),
        Row(
            f"largest float32 matmul, {limit_size}³",
            Figures(largest.median / 1e9, largest.spread / 1e9),
            "GFLOP/s",
            better="higher",
        ),
    ]
    shapes = {
        "base": parameter_count(BASE_A),
        "value": parameter_count(VALUE_A),
        "batch": f"{SIZES.rows} × {SIZES.length}",
        "logits chunk": ours.chunk_length,
        "model GFLOP a step": round(flops / 1e9, 1),
    }
    return Report(rows, dtype="float32 and bfloat16 with float32 master weights", shapes=shapes)
