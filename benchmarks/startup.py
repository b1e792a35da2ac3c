"""Startup: from loaded weights to the first text, with a cold and a warm compile cache; `--help`.

Checkpoints of pair A's shapes with random weights are written to a temporary folder, with the
Llama-2 tokenizer of ../shared. Out: rows. Every start is a separate process.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.fresh_process import in_fresh_process
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import PROJECT_ROOT
from benchmarks.shapes import BASE_A, VALUE_A, parameter_count, write_checkpoint
from benchmarks.timing import Figures, Timing, time_in_turn

ABOUT = "weights loaded until the first text, compile cache cold and warm; --help"

# Every program is kept, however short its compilation.
_KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_PROMPT = "The little boat sailed across the lake, and then"


class Start(NamedTuple):
    """Seconds of one start, without imports."""

    loading: float
    """Until base and value network are loaded."""
    first_text: float
    """From then until the first piece of text is out."""


def run(options: Options) -> Report:
    """Start with an empty compile cache and again with the cache filled by that start, alternately.

    Args:
        options: quick: one start of each kind instead of three, `--help` three times, not five.

    Returns:
        The report.
    """
    helps = time_in_turn(
        {name: lambda name=name: _help(name) for name in ("train.py", "infer.py")},
        repeats=3 if options.quick else 5,
    )
    with tempfile.TemporaryDirectory(prefix="ivl-startup-") as folder:
        models = [Path(folder, name) for name in ("base", "value")]
        for model, arch in zip(models, (BASE_A, VALUE_A), strict=True):
            model.mkdir()
            write_checkpoint(model, arch, tokenizer=True)
        starts: list[tuple[Start, Start]] = []
        for repeat in range(1 if options.quick else 3):
            environment = {**_KEEP_ALL, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache{repeat}"}
            cold, warm = (in_fresh_process(start, environment, *map(str, models)) for _ in range(2))
            starts.append((cold, warm))
    cold, warm = (Figures.of(x.first_text for x in kind) for kind in zip(*starts, strict=True))
    loading = Figures.of(each.loading for pair in starts for each in pair)
    rows = [
        Row("base and value loaded", loading, "s"),
        Row("loaded → first text, compile cache cold", cold, "s"),
        Row(
            "loaded → first text, compile cache warm",
            warm,
            "s",
            peer=Peer("cache cold", cold.median),
            target=Target("ratio", 1 / 0.4),
        ),
        *(_help_row(name, timing) for name, timing in helps.items()),
    ]
    shapes = {"base": parameter_count(BASE_A), "value": parameter_count(VALUE_A), "batch": 1}
    return Report(rows, dtype="float32", shapes=shapes)


def start(base_folder: str, value_folder: str) -> Start:
    """Load and compose both, and decode until there is text; in a fresh process."""
    import jax
    import transformers

    from ivl_jax import GenerationOptions, compose, load_model
    from ivl_jax.composed.kernel_form import loading_form
    from ivl_jax.decoding.loading import spare_the_collector

    _ = transformers.AutoTokenizer  # imported on first use
    jax.block_until_ready(jax.device_put(0.0))  # the backend starts
    spare_the_collector()  # from here on as in infer.py
    started = time.perf_counter()
    form = loading_form(None)
    base, value = (load_model(folder, form=form) for folder in (base_folder, value_folder))
    jax.block_until_ready((base.params, value.params))
    loaded = time.perf_counter()
    model = compose(base, value)
    next(model.stream(_PROMPT, GenerationOptions(max_new_tokens=128)))
    return Start(loaded - started, time.perf_counter() - loaded)


def _help(script: str) -> None:
    subprocess.run(
        [sys.executable, PROJECT_ROOT / script, "--help"], check=True, capture_output=True
    )


def _help_row(script: str, timing: Timing) -> Row:
    return Row(f"python {script} --help", timing.figures, "s", target=Target("median", 1.5))
