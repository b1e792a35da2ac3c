"""Preference losses: values and weights against their formulas, pair by pair."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.forward import network_logits, run_networks
from ivl_jax.composed.network import ComposedParams
from ivl_jax.config import ConfigError, PreferenceConfig, RowsConfig, TrainConfig, ValueConfig
from ivl_jax.data.batching import Batch, lay_out_rows
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.training.loop import run
from ivl_jax.training.loss import count_tokens, loss_sum
from ivl_jax.training.objectives.dpo import make_dpo
from ivl_jax.training.objectives.segments import segment_totals
from tests.training.runs import assert_same_run, crash_and_resume, records
from tests.training.tiny import VOCAB, make_arch, make_loss, make_params, on_device

# Two rows: (chosen, rejected, chosen, rejected) and (chosen, rejected), lengths in tokens.
LENGTHS = [[5, 7, 3, 2], [6, 4]]


@pytest.fixture(scope="module")
def batch() -> Batch:
    def dialogue(length: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(length, dtype=np.int32), np.arange(length) >= min(2, length - 1)

    rows = [[dialogue(length) for length in row] for row in LENGTHS]
    return jax.tree.map(jnp.asarray, lay_out_rows(rows, sequence_length=20, pad_id=0))


@pytest.fixture(scope="module")
def scores(batch: Batch) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shape = batch.tokens.shape
    names = ("log_prob", "base_log_prob")
    drawn = {name: jnp.asarray(-rng.exponential(2.0, shape), jnp.float32) for name in names}
    return drawn | {"base_kl": jnp.full(shape, 0.25)}


def pairs_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks of the chosen and the rejected answer of each pair."""
    segments, counted = np.asarray(batch.segment_ids), np.asarray(batch.loss_mask)
    rows = np.arange(len(segments))[:, None]
    return [
        tuple((segments == id_) & counted & (rows == row) for id_ in (first, first + 1))
        for row, lengths in enumerate(LENGTHS)
        for first in range(1, len(lengths), 2)
    ]


def expected_loss(options: PreferenceConfig, batch: Batch, log_prob, base_log_prob):
    """The sum over pairs, written as in the papers; every token's KL from the base is 1/4."""
    total = 0.0
    for chosen, rejected in pairs_of(batch):
        how = jnp.mean if options.loss == "ipo" else jnp.sum
        good, bad = (how((log_prob - base_log_prob)[side]) for side in (chosen, rejected))
        gap = good - bad
        if options.loss == "ipo":
            total += (gap - 1 / (2 * options.beta)) ** 2
        elif options.loss == "kto":
            point = (chosen.sum() + rejected.sum()) / 2 * 0.25
            total += 1 - jax.nn.sigmoid(options.beta * (good - point))
            total += 1 - jax.nn.sigmoid(options.beta * (point - bad))
        else:
            p, smoothing = jax.nn.sigmoid(options.beta * gap), options.label_smoothing
            total -= (1 - smoothing) * jnp.log(p) + smoothing * jnp.log(1 - p)
        total -= options.sft_weight * jnp.mean(log_prob[chosen])
    return total


@pytest.mark.parametrize(
    "options",
    [
        PreferenceConfig(),
        PreferenceConfig(beta=0.5, label_smoothing=0.2),
        PreferenceConfig(beta=0.3, sft_weight=0.7),
        PreferenceConfig(loss="ipo", beta=0.2),
        PreferenceConfig(loss="kto", beta=0.4, sft_weight=0.1),
    ],
    ids=str,
)
def test_loss_and_its_gradient_are_the_papers(options, batch, scores) -> None:
    dpo = make_dpo(options)
    base = scores["base_log_prob"]
    expected, gradient = jax.jit(
        jax.value_and_grad(lambda log_prob: expected_loss(options, batch, log_prob, base))
    )(scores["log_prob"])
    np.testing.assert_allclose(jax.jit(dpo.loss)(batch, scores), expected, rtol=1e-5)
    weights = jax.jit(dpo.weigh)(batch, scores)["log_prob"]
    np.testing.assert_allclose(weights, gradient, rtol=1e-4, atol=1e-6)
    assert float(dpo.count(batch)) == 3


def test_figures_are_means_over_pairs_and_tokens(batch, scores) -> None:
    dpo = make_dpo(PreferenceConfig(beta=0.5))
    sums = jax.jit(dpo.sums)(batch, scores) | {
        "loss_tokens": batch.loss_mask.sum(),
        "loss": jnp.zeros(()),
    }
    figures = {name: float(sums[a]) / float(sums[b]) for name, (a, b) in dpo.figures.items()}
    ratio = 0.5 * np.asarray(scores["log_prob"] - scores["base_log_prob"])
    rewards = np.array([[ratio[side].sum() for side in pair] for pair in pairs_of(batch)])
    margins = rewards[:, 0] - rewards[:, 1]
    assert figures["reward_margin"] == pytest.approx(margins.mean(), rel=1e-5)
    assert figures["reward_accuracy"] == pytest.approx((margins > 0).mean())
    assert figures["chosen_reward"] == pytest.approx(rewards[:, 0].mean(), rel=1e-5)
    assert figures["rejected_reward"] == pytest.approx(rewards[:, 1].mean(), rel=1e-5)
    assert figures["kl"] == pytest.approx(0.25)


def test_a_segments_total_stands_at_each_of_its_positions() -> None:
    rng = np.random.default_rng(1)
    ids = np.sort(rng.integers(0, 9, (3, 50)), axis=1)
    values = rng.normal(size=ids.shape).astype(np.float32)
    expected = np.stack(
        [[v[i == here].sum() for here in i] for v, i in zip(values, ids, strict=True)]
    )
    np.testing.assert_allclose(jax.jit(segment_totals)(values, ids), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "preference.beta must be > 0"),
        ({"beta": float("nan")}, "preference.beta"),
        ({"label_smoothing": 0.5}, r"must be in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "cannot be combined"),
        ({"loss": "kto", "label_smoothing": 0.1}, "cannot be combined"),
        ({"sft_weight": -1.0}, "must be ≥ 0"),
    ],
)
def test_options_out_of_range_are_refused(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        PreferenceConfig(**options)


@pytest.fixture
def config(tiny_config: TrainConfig, tmp_path) -> TrainConfig:
    rows = [
        {"prompt": f"{i}+{i % 7}", "chosen": str(i + i % 7), "rejected": f"no{i % 7}"}
        for i in range(40)
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(tiny_config.data, train=(str(path),), rows=RowsConfig(format="preference"))
    return replace(tiny_config, objective="dpo", data=data)


def test_margins_grow_while_preferences_are_learnt(config) -> None:
    whole = run(config)
    margins = [
        one["held_out"]["reward_margin"] for one in records(whole.run_dir) if "held_out" in one
    ]
    assert margins == sorted(margins)
    assert {"preference_loss", "reward_margin", "kl", "nll"} <= set(whole.held_out)


@pytest.mark.slow
def test_a_stopped_run_of_preferences_resumes_to_the_bits_of_one_that_never_stopped(
    config, tmp_path, monkeypatch
) -> None:
    whole = run(config)
    config = replace(config, run_dir=str(tmp_path / "stopped"))
    assert_same_run(crash_and_resume(monkeypatch, run, config), whole)


def test_a_model_alone_is_compared_with_its_original() -> None:
    arch, beta = make_arch(), 0.7
    params, original = make_params(arch, 1), make_params(arch, 2)
    rows = [
        [(np.arange(3, 3 + n, dtype=np.int32), np.arange(n) >= 1) for n in row] for row in LENGTHS
    ]
    batch = on_device(lay_out_rows(rows, sequence_length=20, pad_id=0))
    loss = make_loss(
        arch,
        alone=True,
        objective=make_dpo(PreferenceConfig(beta=beta)),
        teacher=make_loss(arch, alone=True).composition,
        chunk_length=6,
    )

    def found(params):
        total, count, sums = loss_sum(
            loss,
            params,
            None,
            batch,
            counts=count_tokens(loss, batch),
            teacher_params=ComposedParams(original),
        )
        return total / count, sums["loss"] / count

    def log_prob(params):
        composed = ComposedParams(params)
        positions, segments = batch.positions, batch.segment_ids
        hidden, _ = run_networks(
            loss.composition, composed, batch.tokens, positions=positions, segment_ids=segments
        )
        logits = network_logits(loss.composition, composed, hidden).base[..., :VOCAB]
        every = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(every, batch.targets[..., None], axis=-1)[..., 0]

    def expected(params):
        ratio = log_prob(params) - log_prob(original)
        gaps = [ratio[good].sum() - ratio[bad].sum() for good, bad in pairs_of(batch)]
        return -jnp.mean(jnp.log(jax.nn.sigmoid(beta * jnp.stack(gaps))))

    gradient, value = jax.jit(jax.grad(found, has_aux=True))(params)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        gradient,
        wanted_gradient,
    )


def test_an_objective_that_compares_needs_something_to_compare_with() -> None:
    with pytest.raises(ValueError, match="dpo compares with a frozen reference: give a base"):
        make_loss(make_arch(), alone=True, objective=make_dpo(PreferenceConfig()))


@pytest.mark.slow
def test_a_model_trained_alone_resumes_and_answers_in_the_chat_format_of_its_run(
    config, tmp_path, monkeypatch
) -> None:
    data = replace(config.data, chat_template="llama-2")
    config = replace(config, method="sft", data=data, value=ValueConfig())
    whole = run(config)
    held_out = [one["held_out"] for one in records(whole.run_dir) if "held_out" in one]
    # Before the first step it is its own reference.
    assert held_out[0]["reward_margin"] == held_out[0]["kl"] == 0
    assert held_out[0]["preference_loss"] == pytest.approx(np.log(2))
    assert held_out[-1]["preference_loss"] < held_out[0]["preference_loss"]
    assert held_out[-1]["kl"] > 0
    config = replace(config, run_dir=str(tmp_path / "stopped"))
    assert_same_run(crash_and_resume(monkeypatch, run, config), whole)
    model = compose(str(whole.output))
    asked = [Message("user", "2+2")]
    wanted = make_chat_format(model.tokenizer, template="llama-2")
    np.testing.assert_array_equal(model.encode(asked), wanted.encode_prompt(asked))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "sft"}, r'learns from demonstrations, which data.format = "sharegpt" or'),
    ],
)
def test_preferences_and_what_cannot_learn_from_them_are_refused_together(
    config, changes, said
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(replace(config, **changes))


def test_demonstrations_are_refused_by_an_objective_of_preferences(tiny_config) -> None:
    with pytest.raises(ConfigError, match='"preference" or "hh"'):
        run(replace(tiny_config, objective="dpo"))
