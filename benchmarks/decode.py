"""Composed decoding of one prompt, compared with PyTorch and the memory's speed.

Weights are random, and the same for every decoder. Out: rows for pair A and, unless quick, for
pair B.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.composed import Composed, Weights, bytes_a_step, composed, random_weights
from benchmarks.decode_contest import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Contender,
    Outcome,
    contest,
    random_prompts,
)
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import BASE_A, BASE_B, VALUE_A, parameter_count
from benchmarks.timing import Figures, available_memory
from ivl_jax.model.architecture import ArchConfig

ABOUT = "composed decoding of one prompt beside PyTorch and the limit of memory"

OURS, ALONE = "ivl_jax", "ivl_jax, base alone"
CACHED, CACHED_BF16 = "torch_cached f32", "torch_cached bf16"
NO_CACHE, PROXY = "torch_nocache f32", "torch_proxy f32"
# Our weights in training and decoding form, PyTorch's in float32 and bfloat16, and the caches.
_COPIES = 4.0


class Plan(NamedTuple):
    """How long the decoders run."""

    new_tokens: int
    repeats: int
    slow_repeats: int
    """Repeats of the peers that take ten times as long."""


def run(options: Options) -> Report:
    """Decode with every contender in turn.

    Args:
        options: quick: only pair A, 32 new tokens, the slow peers once.

    Returns:
        The report; it says so if pair B is left out for lack of memory.
    """
    plan = Plan(32, 3, 1) if options.quick else Plan(NEW_TOKENS, 7, 2)
    rows = [*_pair_rows("pair A", BASE_A, plan, with_targets=True)]
    shapes: dict[str, int | str] = {
        "base A": parameter_count(BASE_A),
        "value": parameter_count(VALUE_A),
        "batch": 1,
        "prompt": PROMPT_TOKENS,
        "new tokens": plan.new_tokens,
    }
    if not options.quick:
        needed = _COPIES * 4 * parameter_count(BASE_B)
        if available_memory() > needed:
            rows += _pair_rows("pair B", BASE_B, Plan(32, 2, 0), with_targets=False)
            shapes["base B, 32 new tokens"] = parameter_count(BASE_B)
        else:
            shapes["base B"] = f"left out: it needs {needed / 1e9:.0f} GB of memory"
    return Report(rows, dtype="float32, and bfloat16 where the peer says so", shapes=shapes)


def _pair_rows(pair: str, arch: ArchConfig, plan: Plan, *, with_targets: bool) -> Iterator[Row]:
    base, value = random_weights(arch, seed=0), random_weights(VALUE_A, seed=1)
    prompts = random_prompts(1, arch.vocab_size)
    contenders = contenders_of(base, value, prompts, plan)
    outcomes, memory = contest(contenders, new_tokens=plan.new_tokens, memory_around=OURS)
    yield from _speed_rows(pair, outcomes, with_targets=with_targets)
    slots = PROMPT_TOKENS + plan.new_tokens / 2
    step = {
        OURS: bytes_a_step([base, value], batch=1, slots=slots),
        ALONE: bytes_a_step([base], batch=1, slots=slots),
    }
    yield Row(
        f"{pair}: beside what memory can read",
        outcomes[OURS].rate,
        "tokens/s",
        "higher",
        limit=memory.limit(outcomes[OURS], step[OURS]),
        target=Target("fraction_of_limit", 0.8) if with_targets else None,
    )
    yield Row(
        f"{pair}: memory, float32 matrix × vector over 1 GiB",
        Figures(memory.rate.median / 1e9, memory.rate.spread / 1e9),
        "GB/s",
        "higher",
    )
    yield Row(
        f"{pair}: step with the value ÷ step of the base alone",
        Figures.of([outcomes[OURS].step.median / outcomes[ALONE].step.median]),
        "×",
        peer=Peer("bytes, likewise", step[OURS] / step[ALONE]),
        target=Target("ratio", 1 / 1.1) if with_targets else None,
    )


def _speed_rows(pair: str, outcomes: Mapping[str, Outcome], *, with_targets: bool) -> Iterator[Row]:
    targets = {CACHED: 2.3, CACHED_BF16: 1.15, NO_CACHE: 15.0}
    ours = outcomes[OURS]
    for name, outcome in outcomes.items():
        if name in (OURS, ALONE):
            continue
        bound = targets.get(name) if with_targets else None
        yield Row(
            f"{pair}: composed decoding",
            ours.rate,
            "tokens/s",
            "higher",
            peer=Peer(name, outcome.rate.median),
            target=None if bound is None else Target("ratio", bound),
        )
    same = float(np.mean(ours.tokens == outcomes[CACHED].tokens))
    yield Row(f"{pair}: tokens equal to those of {CACHED}", Figures.of([100 * same]), "%", "higher")


def contenders_of(
    base: Weights, value: Weights, prompts: np.ndarray, plan: Plan
) -> dict[str, Contender]:
    """Our decoder, the base alone, and every peer, with the same weights.

    Args:
        base: the base.
        value: the value network; both of the proxy's models have its shape too.
        prompts: [B T].
        plan: how long they run; without slow repeats, the slow peers are left out.

    Returns:
        Contenders by name.
    """
    import torch

    from benchmarks.torch_peers import Term, TorchPeer, llama

    def ours(model: Composed, repeats: int) -> Contender:
        return Contender(
            functools.partial(model.prefill, prompts, plan.new_tokens), model.decode, repeats
        )

    def theirs(peer: TorchPeer, repeats: int, *, warm_up: bool = True) -> Contender:
        return Contender(
            functools.partial(peer.prefill, prompts),
            functools.partial(peer.decode, new_tokens=plan.new_tokens - 1),
            repeats,
            warm_up,
        )

    def terms(dtype: torch.dtype) -> tuple[Term, Term]:
        return Term(llama(*base, dtype=dtype), 1.0), Term(llama(*value, dtype=dtype), 1.0)

    of_base, of_value = terms(torch.float32)
    contenders = {
        OURS: ours(composed(base, value), plan.repeats),
        ALONE: ours(composed(base), plan.repeats),
        CACHED: theirs(TorchPeer((of_base, of_value)), plan.repeats),
        CACHED_BF16: theirs(TorchPeer(terms(torch.bfloat16)), plan.repeats),
    }
    if plan.slow_repeats:
        pair = (Term(of_value.model, 1.0), Term(of_value.model, -1.0))
        proxy, without = TorchPeer((of_base, *pair)), TorchPeer((of_base, of_value), cached=False)
        contenders[PROXY] = theirs(proxy, plan.slow_repeats)
        contenders[NO_CACHE] = theirs(without, plan.slow_repeats, warm_up=False)
    return contenders
