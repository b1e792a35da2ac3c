"""One accelerator in eight minutes: attention, composed decoding, training steps, drafts, the demo.

Weights and tokens are random. Out: rows with the device's own measured limits. A part that fails is
recorded under `failures`, and the others still run while there is time. Without an accelerator, or
with `quick`, everything runs scaled down.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_attention import attention_rows
from benchmarks.composed import Composed, Weights, bytes_a_step, composed, with_draft
from benchmarks.decode_contest import PROMPT_TOKENS, random_prompts
from benchmarks.known_chain import chain_weights, cycle, followers
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import PROJECT_ROOT
from benchmarks.shapes import BASE_7B, BASE_B, BASE_C, VALUE_C, draw_params, parameter_count
from benchmarks.timing import Figures, Timing, time_work
from benchmarks.training_steps import OurStep, Sizes, model_flops
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params

ABOUT = "one accelerator: attention, decoding and training beside its measured limits; the demo"

_SECONDS = 450  # for all parts; the demo gets the rest
_DEMO_NEEDS = 60
_SIZES = Sizes(rows=4, length=2048)
_ACCEPTED = 0.8  # share of a draft's proposals


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        dtype: Of weights and products.
        base: The base that decodes.
        value: The value network, and both networks of the training step.
        draft: The draft of the base.
        batches: Rows decoded together, one after the other.
        new_tokens: Tokens decoded a row.
        training: Sizes of the training batches.
        attention: Rows and tokens of the timed attention.
        matrix: Side of the square product that measures the arithmetic limit.
        copied: Elements of the array whose copy measures the memory limit.
        repeats: Timed calls of each.
        demo: Whether the demo runs too.
    """

    dtype: str = "bfloat16"
    base: ArchConfig = BASE_7B
    value: ArchConfig = BASE_B
    draft: ArchConfig = BASE_B
    batches: tuple[int, ...] = (1, 16)
    new_tokens: int = 128
    training: tuple[Sizes, ...] = (_SIZES, Sizes(rows=2, length=4096))
    attention: Sizes = _SIZES
    matrix: int = 8192
    copied: int = 1 << 30
    repeats: int = 5
    demo: bool = True


_SMALL = Scale(
    dtype="float32",
    base=BASE_C,
    value=VALUE_C,
    draft=VALUE_C,
    batches=(1, 2),
    new_tokens=8,
    training=(Sizes(2, 32), Sizes(1, 64)),
    attention=Sizes(2, 64),
    matrix=512,
    copied=1 << 20,
    repeats=2,
    demo=False,
)


@dataclass
class _Check:
    """The results of the parts so far."""

    scale: Scale
    started: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    bytes_a_second: float | None = None
    operations_a_second: float | None = None

    def run(self, name: str, part: Callable[["_Check"], Iterator[Row]]) -> None:
        """Run a part if there is time; rows that it yields before a failure are kept."""
        if self.seconds_left <= 0:
            self.failed[name] = f"not run: the parts before it took more than {_SECONDS} s"
            return
        try:
            self.rows.extend(part(self))
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
        finally:
            jax.clear_caches()

    @property
    def seconds_left(self) -> float:
        """The remaining time for all parts."""
        return self.started + _SECONDS - time.perf_counter()


def run(options: Options) -> Report:
    """Run every part.

    Args:
        options: quick: scaled down, as on a machine without an accelerator.

    Returns:
        The report; `failed` names the parts that failed, or had no time.
    """
    small = options.quick or jax.default_backend() == "cpu"
    check = _Check(_SMALL if small else Scale())
    scale = check.scale
    for name, part in _PARTS.items():
        check.run(name, part)
    shapes = {
        "base": parameter_count(scale.base),
        "value": parameter_count(scale.value),
        "prompt": PROMPT_TOKENS,
        "new tokens": scale.new_tokens,
        "backend": jax.default_backend(),
        "scaled down": small,
        "seconds": round(time.perf_counter() - check.started, 1),
        "peak device memory, GB": _peak_memory(),
    }
    return Report(
        check.rows,
        dtype=f"{scale.dtype}; master weights float32",
        shapes=shapes,
        failed=check.failed,
    )


def _limits(check: _Check) -> Iterator[Row]:
    """The device's own speed: a matrix product, and a copy (bytes read and written)."""
    scale, dtype = check.scale, jnp.dtype(check.scale.dtype)
    shape = (scale.matrix, scale.matrix)
    matrix = jax.random.normal(jax.random.key(0), shape, dtype)
    product = jax.jit(jnp.matmul)
    timing = time_work(lambda: product(matrix, matrix), repeats=scale.repeats)
    rate = timing.rate(2 * scale.matrix**3)
    check.operations_a_second = rate.median
    yield Row(f"matrix product, {scale.matrix}³", _scaled(rate, 1e12), "TFLOP/s", "higher")
    source = jax.random.normal(jax.random.key(1), (scale.copied,), dtype)
    copy = jax.jit(jnp.negative)
    timing = time_work(lambda: copy(source), repeats=scale.repeats)
    rate = timing.rate(2 * source.nbytes)
    check.bytes_a_second = rate.median
    yield Row("memory, copy", _scaled(rate, 1e9), "GB/s", "higher")


def _attention(check: _Check) -> Iterator[Row]:
    """Fused attention compared with the plain form."""
    scale = check.scale
    return attention_rows(scale.value, scale.attention, dtype=scale.dtype, repeats=scale.repeats)


def _decoding(check: _Check) -> Iterator[Row]:
    """A base with a value network, decoded greedily at every batch size."""
    scale = check.scale
    networks = _networks(scale)
    slots = PROMPT_TOKENS + scale.new_tokens / 2
    needed = {batch: bytes_a_step(networks, batch=batch, slots=slots) for batch in scale.batches}
    model = composed(*networks)
    del networks  # the model holds the form that decodes
    for batch in scale.batches:
        prompts = random_prompts(batch, scale.base.vocab_size)
        timing, _ = _time_decoding(model, prompts, scale)
        limit = None
        if check.bytes_a_second is not None:
            limit = check.bytes_a_second / needed[batch] * batch
        yield Row(
            f"composed decoding, batch {batch}",
            timing.rate(batch * (scale.new_tokens - 1)),
            "tokens/s",
            "higher",
            limit=limit,
            target=Target("fraction_of_limit", 0.6) if limit and scale.demo else None,
        )
        yield _compilation(f"composed decoding, batch {batch}", timing)


def _int8(check: _Check) -> Iterator[Row]:
    """The same with the base's kernels in int8, at the smallest batch."""
    scale, batch = check.scale, min(check.scale.batches)
    model = composed(*_networks(scale), int8_base=True)
    prompts = random_prompts(batch, scale.base.vocab_size)
    timing, _ = _time_decoding(model, prompts, scale)
    name = f"composed decoding, int8 base, batch {batch}"
    yield Row(name, timing.rate(batch * (scale.new_tokens - 1)), "tokens/s", "higher")


def _speculation(check: _Check) -> Iterator[Row]:
    """A draft with a known share of accepted proposals, and the same tokens without one."""
    scale, order = check.scale, cycle(check.scale.base.vocab_size)
    base = chain_weights(scale.base, followers(order), seed=0, dtype=scale.dtype)
    plain = composed(base, _networks(scale)[1])
    del base
    draft = followers(order, agreement=_ACCEPTED)
    drafted = with_draft(plain, chain_weights(scale.draft, draft, seed=1, dtype=scale.dtype))
    prompts = random_prompts(1, scale.base.vocab_size)
    timing, expected = _time_decoding(plain, prompts, scale)
    peer = timing.rate(scale.new_tokens - 1)
    timing, tokens = _time_decoding(drafted, prompts, scale)
    if not np.array_equal(tokens, expected):
        raise RuntimeError("the tokens with a draft differ from those without")
    yield Row(
        f"composed decoding with a draft, {_ACCEPTED} accepted, batch 1",
        timing.rate(scale.new_tokens - 1),
        "tokens/s",
        "higher",
        peer=Peer("without a draft", peer.median),
    )


def _networks(scale: Scale) -> list[Weights]:
    """Random weights of base and value network."""
    return [
        Weights(arch, draw_params(abstract_params(arch, param_dtype=scale.dtype), seed))
        for seed, arch in enumerate((scale.base, scale.value))
    ]


def _time_decoding(model: Composed, prompts: np.ndarray, scale: Scale) -> tuple[Timing, np.ndarray]:
    """The time of decoding after the prompts are read, and the tokens."""
    first, seconds, tokens = 0.0, [], np.empty(0)
    for turn in range(-1, scale.repeats):
        state = jax.block_until_ready(model.prefill(prompts, scale.new_tokens))
        started = time.perf_counter()
        tokens = model.decode(state)
        elapsed = time.perf_counter() - started
        if turn < 0:
            first = elapsed
        else:
            seconds.append(elapsed)
    return Timing(first, tuple(seconds)), tokens


def _training(check: _Check) -> Iterator[Row]:
    """A training step of a value network with a frozen base of the same shape."""
    scale = check.scale
    for sizes in scale.training:
        started = time.perf_counter()
        step = OurStep(
            scale.value, scale.value, sizes, bfloat16=scale.dtype == "bfloat16", compact=True
        )
        made = time.perf_counter() - started
        timing = time_work(step, repeats=scale.repeats)
        flops = model_flops(scale.value, scale.value, sizes, base_runs=True)
        limit = None
        if check.operations_a_second is not None:
            limit = check.operations_a_second / flops * sizes.tokens
        name = f"training step, {sizes.rows} × {sizes.length} tokens"
        yield Row(
            name,
            timing.rate(sizes.tokens),
            "tokens/s",
            "higher",
            limit=limit,
            target=Target("fraction_of_limit", 0.4) if limit and scale.demo else None,
        )
        yield Row(f"{name}: temporaries", Figures(step.temporary_bytes() / 1e9, 0.0), "GB")
        yield Row(f"{name}: weights made and compiled", Figures(made, 0.0), "s")
        del step  # before the next one's weights are made


def _demo(check: _Check) -> Iterator[Row]:
    """The demo in a separate process, if there is time."""
    if not check.scale.demo:
        return
    left = check.seconds_left
    if left < _DEMO_NEEDS:
        raise TimeoutError(f"only {left:.0f} s were left, but it needs {_DEMO_NEEDS}")
    with tempfile.TemporaryDirectory(prefix="ivl-demo-") as folder:
        command = [sys.executable, "-m", "ivl_jax.experiments.demo"]
        paths = os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")])
        # This process holds most of the device's memory, but the demo needs little.
        environment = os.environ | {
            "PYTHONPATH": paths,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        started = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=Path(folder),
            env=environment,
            timeout=left,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the demo failed: {done.stderr[-400:]}")
        yield Row("the demo", Figures(time.perf_counter() - started, 0.0), "s")


_PARTS: dict[str, Callable[[_Check], Iterator[Row]]] = {
    "limits": _limits,
    "attention": _attention,
    "decoding": _decoding,
    "training": _training,
    "int8": _int8,
    "speculation": _speculation,
    "demo": _demo,
}


def _compilation(what: str, timing: Timing) -> Row:
    """How much longer the first call took than a usual one."""
    first = timing.warm_up or 0.0
    return Row(f"{what}: compiled", Figures(max(0.0, first - timing.figures.median), 0.0), "s")


def _scaled(figures: Figures, unit: float) -> Figures:
    return Figures(figures.median / unit, figures.spread / unit)


def _peak_memory() -> float | None:
    """The device's peak memory in GB; None if it does not record it."""
    statistics: dict[str, Any] | None = jax.devices()[0].memory_stats()
    peak = (statistics or {}).get("peak_bytes_in_use")
    return None if peak is None else round(peak / 1e9, 2)
