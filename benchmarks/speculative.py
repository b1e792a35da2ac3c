"""Composed decoding with a draft, compared with the same composition without one.

Out: rows for pair A's shapes with a draft of a tenth of the base, for shares of accepted proposals
from 0.5 to 0.95, set by the weights; then for the embedded family: L drafted by S with one value
network, trained here for an epoch.

The shares are set by weights with a known greedy text (`benchmarks.known_chain`): the draft's
differs from the base's after a known share of the tokens. Every product is computed in full.
"""

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.composed import Composed, Weights, composed, random_weights, with_draft
from benchmarks.decode_contest import NEW_TOKENS, PROMPT_TOKENS, Contender, contest, random_prompts
from benchmarks.known_chain import chain_weights, cycle, followers
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import PROJECT_ROOT
from benchmarks.shapes import BASE_A, DRAFT_A, VALUE_A, parameter_count
from benchmarks.timing import time_in_turn
from ivl_jax.decoding.device.state import DecodeState

ABOUT = "speed with a draft against the share of its proposals accepted; the peer is ours"

_PLAIN = "without a draft"
# Every n-th of the family's test questions is asked.
_EVERY = 115
# Share of proposals accepted → times as fast as without a draft.
_TARGETS = {0.5: 0.95, 0.8: 1.45}


class Plan(NamedTuple):
    """How much is measured."""

    shares: tuple[float, ...]
    """Of proposals accepted."""
    lengths: tuple[int, ...]
    """Fixed numbers of proposals, measured at 0.8."""
    batches: tuple[int, ...]
    """Rows decoded together, measured at 0.8 besides one alone."""
    new_tokens: int
    repeats: int
    family: bool


_FULL = Plan((0.5, 0.6, 0.7, 0.8, 0.9, 0.95), (3,), (8,), NEW_TOKENS, 5, True)
_QUICK = Plan((0.5, 0.8), (), (), 64, 3, False)


class _Pair(NamedTuple):
    """Pair A with a known greedy text."""

    order: np.ndarray
    """Of `cycle`."""
    plain: Composed
    """Without a draft."""


@dataclass
class _Drafted:
    """A model with a draft, which remembers how much was accepted."""

    model: Composed
    accepted: int = 0
    proposed: int = 0

    def decode(self, state: DecodeState) -> np.ndarray:
        """As `Composed.decode`."""
        tokens, state = self.model.decode_to_end(state)
        assert state.speculation is not None
        self.accepted, self.proposed = (
            int(np.sum(each)) for each in (state.speculation.accepted, state.speculation.proposed)
        )
        return tokens


def run(options: Options) -> Report:
    """Decode with and without drafts in turn.

    Args:
        options: quick: two shares, 64 new tokens, no family.

    Returns:
        The report.
    """
    plan = _QUICK if options.quick else _FULL
    order = cycle(BASE_A.vocab_size)
    base = chain_weights(BASE_A, followers(order), seed=0)
    pair = _Pair(order, composed(base, random_weights(VALUE_A, seed=1)))
    del base  # only its copy arranged for decoding is needed
    rows = [*_pair_rows(plan, pair, 1, dict.fromkeys(plan.shares, 0))]
    rows += [row for batch in plan.batches for row in _pair_rows(plan, pair, batch, {0.8: 0})]
    for length in plan.lengths:
        rows += _pair_rows(plan, pair, 1, {0.8: length})
    if plan.family:
        rows += _family_rows()
    shapes = {
        "base A": parameter_count(BASE_A),
        "value": parameter_count(VALUE_A),
        "draft": parameter_count(DRAFT_A),
        "prompt": PROMPT_TOKENS,
        "new tokens": plan.new_tokens,
    }
    return Report(rows, dtype="float32", shapes=shapes)


def _pair_rows(plan: Plan, pair: _Pair, batch: int, lengths: Mapping[float, int]) -> Iterator[Row]:
    """One row for each share of accepted proposals, with its number of proposals (0: adapting)."""
    plain, order = pair.plain, pair.order
    prompts = random_prompts(batch, BASE_A.vocab_size)
    prompts[:, -1] = order[np.arange(batch) * (len(order) // batch)]
    drafted = {
        share: _Drafted(with_draft(plain, _draft(order, share), length=length))
        for share, length in lengths.items()
    }
    prefill = functools.partial(plain.prefill, prompts, plan.new_tokens)
    contenders = {_PLAIN: Contender(prefill, plain.decode, plan.repeats)}
    for share, one in drafted.items():
        prefill = functools.partial(one.model.prefill, prompts, plan.new_tokens)
        contenders[str(share)] = Contender(prefill, one.decode, plan.repeats)
    outcomes, _ = contest(contenders, new_tokens=plan.new_tokens)
    alone = outcomes[_PLAIN]
    for share, one in drafted.items():
        outcome, length = outcomes[str(share)], lengths[share]
        if not np.array_equal(outcome.tokens, alone.tokens):
            raise RuntimeError(f"the tokens with a draft differ from those without, at {share}")
        bound = _TARGETS.get(share) if batch == 1 and not length else None
        yield Row(
            f"pair A, batch {batch}: {share:.2f} accepted, "
            + (f"{length} proposed at a time" if length else "length adapting")
            + f" ({one.accepted} of {one.proposed})",
            outcome.rate,
            "tokens/s",
            "higher",
            peer=Peer(_PLAIN, alone.rate.median),
            target=None if bound is None else Target("ratio", bound),
        )


def _draft(order: np.ndarray, share: float) -> Weights:
    return chain_weights(DRAFT_A, followers(order, agreement=share), seed=2)


def _family_rows() -> Iterator[Row]:
    """L drafted by S: what is accepted of real proposals, and what that brings."""
    from ivl_jax.assets import family_folder
    from ivl_jax.checkpoint import load_value
    from ivl_jax.config import TrainConfig, load_config
    from ivl_jax.data.formats import Message
    from ivl_jax.decoding.compose import compose
    from ivl_jax.decoding.requests import GenerationOptions
    from ivl_jax.experiments.demo import demo_config
    from ivl_jax.experiments.demonstrations import build_items, select, write_demonstrations
    from ivl_jax.training.loop import run as train
    from ivl_jax.weights.language_model import load_language_model

    items = build_items()
    with tempfile.TemporaryDirectory(prefix="ivl-speculative-") as folder:
        files = write_demonstrations(Path(folder) / "demonstrations", items)
        config = load_config(PROJECT_ROOT / "configs/demo.toml", TrainConfig)
        config = replace(config, step=replace(config.step, epochs=1))
        value_folder = train(demo_config(config, files, run_dir=Path(folder))).output
        assert value_folder is not None
        value = load_value(value_folder)
    large, small = (load_language_model(str(family_folder(name))) for name in ("L", "S"))
    questions = [item.question for item in select(items, "test")[::_EVERY]]
    prompts = [[Message("user", question)] for question in questions]
    models = {
        _PLAIN: compose(large, value),
        "S, length adapting": compose(large, value, draft=small),
        "S, 3 proposed at a time": compose(large, value, draft=small, draft_length=3),
    }
    found = {}

    def work(name: str) -> None:
        options = GenerationOptions(max_new_tokens=48)
        found[name] = models[name].generate(prompts, options, batch_size=1)

    timings = time_in_turn({name: functools.partial(work, name) for name in models}, repeats=3)
    counts = {name: sum(len(each.token_ids) for each in texts) for name, texts in found.items()}
    alone = timings[_PLAIN].rate(counts[_PLAIN])
    for name in list(models)[1:]:
        proposed = sum(each.proposed_tokens for each in found[name])
        accepted = sum(each.accepted_tokens for each in found[name])
        same = _same(found[name], found[_PLAIN])
        yield Row(
            f"family, L drafted by {name}: {accepted} of {proposed} accepted; "
            f"{same} of {len(prompts)} texts the same",
            timings[name].rate(counts[name]),
            "tokens/s",
            "higher",
            peer=Peer(_PLAIN, alone.median),
        )


def _same(texts: Sequence[object], others: Sequence[object]) -> int:
    return sum(one == other for one, other in zip(texts, others, strict=True))
