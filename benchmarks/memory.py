"""Peak temporaries of the training step with a large vocabulary: chunked or whole logits.

Weights and tokens are random. Out: rows with bytes from XLA's own analysis of the compiled step,
and seconds of both forms, timed alternately.
"""

import dataclasses

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import VALUE_A, parameter_count
from benchmarks.timing import Figures, time_in_turn
from benchmarks.training_steps import OurStep, Sizes

ABOUT = "peak temporaries of the step at a vocabulary of 128,256: logits in chunks and whole"

SIZES = Sizes(rows=2, length=2048)
QUICK_SIZES = Sizes(rows=2, length=256)
# Base and value network have pair A's value shape, with Llama-3's vocabulary.
ARCH = dataclasses.replace(VALUE_A, vocab_size=128_256)


def run(options: Options) -> Report:
    """Compile both forms and time them.

    Args:
        options: quick: 256 positions instead of 2,048 and one repeat instead of five.

    Returns:
        The report.
    """
    sizes = QUICK_SIZES if options.quick else SIZES
    chunked = OurStep(ARCH, ARCH, sizes, penalty="l1")
    whole = OurStep(ARCH, ARCH, sizes, penalty="l1", chunk_length=sizes.length)
    peaks = [step.temporary_bytes() / 1e9 for step in (chunked, whole)]
    timings = time_in_turn({"chunked": chunked, "whole": whole}, repeats=1 if options.quick else 5)
    seconds = timings["chunked"].figures
    rows = [
        Row(
            "peak temporaries of the step, logits by chunks",
            Figures(peaks[0], 0.0),
            "GB",
            peer=Peer("logits whole", peaks[1]),
            target=Target("ratio", 2.0),
        ),
        Row(
            "seconds of the step, logits by chunks",
            seconds,
            "s",
            peer=Peer("logits whole", timings["whole"].figures.median),
            target=Target("ratio", 1 / 1.05),
        ),
    ]
    shapes = {
        "base and value": parameter_count(ARCH),
        "vocabulary": ARCH.vocab_size,
        "batch": f"{sizes.rows} × {sizes.length}",
        "logits chunk": chunked.chunk_length,
        "bytes of one model's logits": sizes.tokens * ARCH.vocab_size * 4,
    }
    return Report(rows, dtype="float32", shapes=shapes)
