"""Training steps from cached base states compared with steps that run the base, from epoch 2 on.

In: GSM8K and the Llama-2 tokenizer under ../shared; weights are random. Out: rows in tokens per
second. Both use the training loop's own parts: the batch iterator, which in one case reads the
states from disk, and the compiled step.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import BASE_A, BASE_B, SHARED, VALUE_A, parameter_count, write_checkpoint
from benchmarks.timing import Figures, time_in_turn, time_work
from benchmarks.training_steps import Sizes
from ivl_jax.config import (
    BaseConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RowsConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
)
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.sharding import place_batch
from ivl_jax.training.models import choose_models
from ivl_jax.training.setup import cache_base_states, make_run_mesh, prepare, prepare_data
from ivl_jax.training.step import split_micro_batches

ABOUT = "epochs from cached base states beside epochs that run the base"

SIZES = Sizes(rows=4, length=256)
DIALOGUES = 32  # about 6,000 tokens, half a dozen batches
QUICK_DIALOGUES = 16


class Pair(NamedTuple):
    """A base for pair A's value network, and the target speedup of its cached epochs."""

    name: str
    base: ArchConfig
    target: float
    repeats: int


PAIRS = (Pair("pair A", BASE_A, 1.7, 10), Pair("pair B", BASE_B, 5.0, 5))


def run(options: Options) -> Report:
    """Cache the states of each base and time steps of both kinds in turn.

    Args:
        options: quick: pair A only, fewer dialogues, three repeats.

    Returns:
        The report.
    """
    pairs = PAIRS[:1] if options.quick else PAIRS
    dialogues = QUICK_DIALOGUES if options.quick else DIALOGUES
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ivl-cached-states-") as folder:
        value = Path(folder, "value")
        value.mkdir()
        write_checkpoint(value, VALUE_A, tokenizer=True)
        demonstrations = Path(folder, "demonstrations.jsonl")
        with (SHARED / "data/gsm8k/train.jsonl").open("rb") as lines:
            demonstrations.write_bytes(b"".join(next(lines) for _ in range(dialogues)))
        for pair in pairs:
            base = Path(folder, pair.name)
            base.mkdir()
            write_checkpoint(base, pair.base, tokenizer=True)
            config = _config(base, value, demonstrations, folder)
            rows += _rows(pair, config, repeats=3 if options.quick else pair.repeats)
    shapes = {pair.name: parameter_count(pair.base) for pair in pairs} | {
        "value": parameter_count(VALUE_A),
        "batch": f"{SIZES.rows} × {SIZES.length}",
        "dialogues": dialogues,
    }
    return Report(rows, dtype="float32", shapes=shapes)


def _config(base: Path, value: Path, demonstrations: Path, folder: str) -> TrainConfig:
    return TrainConfig(
        run_dir=f"{folder}/run",
        base=BaseConfig(path=str(base)),
        value=ValueConfig(path=str(value)),
        data=DataConfig(
            train=(str(demonstrations),),
            validation_fraction=0.0,
            rows=RowsConfig(
                format="fields",
                user_template="{question}",
                assistant_template="{answer}",
            ),
            data_dir=f"{folder}/data",
            chat_template="plain",
            max_length=SIZES.length,
        ),
        optimizer=OptimizerConfig(schedule="constant"),
        step=StepConfig(max_steps=10_000, batch_size=SIZES.rows),
        mesh=MeshConfig(fsdp=1),
    )


def _rows(pair: Pair, config: TrainConfig, *, repeats: int) -> list[Row]:
    online = _step(config)
    before = _megabytes_of_states(config)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, cache_states=True))
    writing = time_work(lambda: _cache(config), repeats=1, warm_up=0)
    timings = time_in_turn({"online": online, "cached": _step(config)}, repeats=repeats)
    rates = {name: timing.rate(SIZES.tokens) for name, timing in timings.items()}
    size = _megabytes_of_states(config) - before
    return [
        Row(
            f"{pair.name}, step from cached states",
            rates["cached"],
            "tokens/s",
            better="higher",
            peer=Peer("the base runs", rates["online"].median),
            target=Target("ratio", pair.target),
        ),
        Row(f"{pair.name}, writing the states once", writing.figures, "s"),
        Row(f"{pair.name}, states on disk", Figures(size, 0.0), "MB"),
    ]


def _megabytes_of_states(config: TrainConfig) -> float:
    files = Path(config.data.data_dir, "base_states").rglob("*.arrayrecord")
    return sum(file.stat().st_size for file in files) / 1e6


def _cache(config: TrainConfig) -> None:
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    cache_base_states(config, models, prepare_data(config, models, mesh), mesh)


def _step(config: TrainConfig) -> Callable[[], Any]:
    """One step of a run: reads a batch, places it and trains on it."""
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    data = prepare_data(config, models, mesh)
    prepared = prepare(config, models, data, mesh)
    (program,) = prepared.programs
    state = prepared.make_state()

    def step() -> Any:
        nonlocal state
        batch = place_batch(split_micro_batches(next(data.train), 1), mesh, micro_batched=True)
        state, metrics = program.step(state, program.base_params, batch)
        return metrics["loss"]

    return step
