"""The loss: exact means over a global batch, no gradient where nothing counts, none to the base."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.token_scores import choose_chunk_length
from ivl_jax.composition import SCHEMES, SchemeInputs, value_forward
from ivl_jax.model.decoder import build_decoder, forward, zero_head
from ivl_jax.training.loss import count_tokens, loss_sum
from ivl_jax.training.objectives.sft import SFT
from tests.jaxprs import multiplied_dtypes
from tests.training.tiny import (
    VOCAB,
    make_arch,
    make_batch,
    make_loss,
    make_params,
    on_device,
)

ARCH = make_arch(num_hidden_layers=1)
BASE, VALUE = make_params(ARCH, 0), make_params(ARCH, 1)
BATCH = on_device(make_batch())
SCALE = jnp.broadcast_to(jnp.array([[0.0], [0.5], [1.0], [2.0]] * 2), BATCH.tokens.shape)


@functools.partial(jax.jit, static_argnums=(0,))
def loss_and_gradient(static, params, base_params, batch, counts):
    def mean(params):
        total, denominator, aux = loss_sum(static, params, base_params, batch, counts=counts)
        return total / denominator, aux

    return jax.value_and_grad(mean, has_aux=True)(params)


def run(static, params=VALUE, base=BASE, batch=BATCH):
    return loss_and_gradient(static, params, base, batch, count_tokens(static, batch))


@functools.cache
def whole_logits(connection, *, scaled=False):
    graphdef = build_decoder(ARCH)
    where = {"positions": BATCH.positions, "segment_ids": BATCH.segment_ids}

    @jax.jit
    def both(tokens, value_tokens):
        base = forward(graphdef, BASE, tokens, **where)
        base = base * SCALE[:, :, None] if scaled else base
        value, _ = value_forward(
            SCHEMES[connection],
            graphdef,
            VALUE,
            SchemeInputs(value_tokens, base, vocab_size=VOCAB),
            **where,
        )
        return base, value

    return both


def numpy_loss(batch, *, kind="l1", weight=0.7, positions="real", connection="residual"):
    """The definition, in float64 NumPy on whole logits."""
    scaled = batch.base_scale is not None
    logits = whole_logits(connection, scaled=scaled)(batch.tokens, batch.tokens)
    base, value = (np.asarray(z, np.float64)[..., :VOCAB] for z in logits)
    z = base + value
    log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= z.max(-1, keepdims=True)
    mask = np.asarray(batch.loss_mask)
    nll = -np.take_along_axis(log_p, np.asarray(batch.targets)[..., None], -1)[..., 0]
    real = np.asarray(batch.segment_ids) > 0
    if positions == "all":
        real = np.ones_like(real)
    size = {"none": 0 * value, "l1": np.abs(value), "l2": value**2}[kind].mean(-1)
    return nll[mask].mean() + weight * size[real].mean()


@pytest.mark.parametrize(
    ("kind", "positions"), [("none", "real"), ("l1", "real"), ("l1", "all"), ("l2", "real")]
)
def test_loss_is_its_definition(kind, positions):
    static = make_loss(ARCH, penalty_kind=kind, penalty_positions=positions)
    (loss, _), _ = run(static)
    assert float(loss) == pytest.approx(numpy_loss(BATCH, kind=kind, positions=positions), rel=1e-5)


@pytest.mark.parametrize("connection", ["cascade", "cascade_no_text"])
def test_loss_is_its_definition_in_a_cascade(connection):
    (loss, _), _ = run(make_loss(ARCH, connection=connection))
    assert float(loss) == pytest.approx(numpy_loss(BATCH, connection=connection), rel=1e-5)


@pytest.mark.parametrize("chunk_length", [5, 1 << 30])
@pytest.mark.parametrize("connection", ["residual", "cascade"])
def test_a_scaled_base_is_scaled_wherever_it_is_read(connection, chunk_length):
    batch, static = (
        BATCH._replace(base_scale=SCALE),
        make_loss(ARCH, connection=connection, chunk_length=chunk_length),
    )
    (loss, _), _ = run(static, batch=batch)
    expected = numpy_loss(batch, connection=connection)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - numpy_loss(BATCH, connection=connection)) > 1e-3


@pytest.mark.parametrize("connection", ["cascade", "cascade_no_text"])
def test_the_base_prediction_reaches_every_embedding(connection):
    """Where softmax(z_base) enters, each token's embedding gets gradient, not only those read."""
    few = BATCH._replace(tokens=jnp.where(BATCH.token_mask, 5, BATCH.tokens))
    _, gradient = run(make_loss(ARCH, connection=connection), batch=few)
    embedding = np.abs(np.asarray(gradient["embed_tokens"]["embedding"])).max(axis=1)
    assert embedding[:VOCAB].min() > 1e-6
    np.testing.assert_array_equal(embedding[VOCAB:], 0.0)
    _, residual = run(make_loss(ARCH), batch=few)
    unread = np.delete(np.asarray(residual["embed_tokens"]["embedding"]), [2, 5], axis=0)
    np.testing.assert_array_equal(unread, 0.0)


@pytest.mark.parametrize(
    ("chunk_length", "connection"), [(5, "residual"), (4, "cascade"), (7, "cascade_no_text")]
)
def test_chunks_change_neither_loss_nor_gradient(chunk_length, connection):
    whole = make_loss(ARCH, connection=connection, unknown_ids=(7,))
    chunked = make_loss(ARCH, connection=connection, unknown_ids=(7,), chunk_length=chunk_length)
    (loss, aux), gradient = run(whole)
    (chunked_loss, chunked_aux), chunked_gradient = run(chunked)
    assert float(chunked_loss) == pytest.approx(float(loss), rel=1e-6)
    for name, total in aux.items():
        assert float(chunked_aux[name]) == pytest.approx(float(total), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        chunked_gradient,
        gradient,
    )


def test_gradient_taken_in_the_forward_pass_is_that_of_the_definition():
    static = make_loss(ARCH, chunk_length=5)

    @jax.jit
    def definition(params):
        graphdef = build_decoder(ARCH)
        where = {"positions": BATCH.positions, "segment_ids": BATCH.segment_ids}
        base = forward(graphdef, BASE, BATCH.tokens, **where)[..., :VOCAB]
        value = forward(graphdef, params, BATCH.tokens, **where)[..., :VOCAB]
        log_p = jax.nn.log_softmax(base + value)
        nll = -jnp.take_along_axis(log_p, BATCH.targets[..., None], axis=-1)[..., 0]
        ce = jnp.sum(nll * BATCH.loss_mask.astype(jnp.float32)) / jnp.sum(BATCH.loss_mask)
        real = BATCH.token_mask.astype(jnp.float32)
        return ce + 0.7 * jnp.sum(jnp.mean(jnp.abs(value), -1) * real) / jnp.sum(real)

    with jax.numpy_dtype_promotion("standard"):
        expected = jax.grad(definition)(VALUE)
    _, gradient = run(static)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected
    )


def test_masked_targets_and_padding_give_exactly_zero_gradient_even_when_pad_is_eos():
    """Without a penalty, what is not counted may be anything: loss and gradient keep every bit."""
    static = make_loss(ARCH, penalty_kind="none", chunk_length=5)
    scrambled = jnp.where(BATCH.loss_mask, BATCH.targets, (BATCH.targets + 17) % VOCAB)
    padding = (BATCH.segment_ids == 0) & (BATCH.tokens == 2)
    assert bool(jnp.any(padding))
    tokens = jnp.where(padding, 5, BATCH.tokens)
    (loss, _), gradient = run(static)
    (other_loss, _), other = run(static, batch=BATCH._replace(targets=scrambled, tokens=tokens))
    assert float(loss) == float(other_loss)
    embedding = other["embed_tokens"]["embedding"] - gradient["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(np.asarray(embedding)[[2, 5]], 0.0)
    jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_an_eos_that_counts_does_get_gradient():
    """The mask comes from roles: a counted target with the padding's id is learned."""
    static = make_loss(ARCH, penalty_kind="none")
    real_only = BATCH.loss_mask & BATCH.token_mask
    as_eos = BATCH._replace(targets=jnp.where(real_only, 2, BATCH.targets))
    (_, aux), gradient = run(static, batch=as_eos)
    assert float(aux["loss_tokens"]) == float(jnp.sum(BATCH.loss_mask))
    column = gradient["lm_head"]["kernel"][:, 2]
    assert float(jnp.max(jnp.abs(column))) > 1e-3


def test_no_counted_token_gives_zero_cross_entropy_and_a_finite_gradient():
    nothing = BATCH._replace(loss_mask=jnp.zeros_like(BATCH.loss_mask))
    (loss, _), gradient = run(make_loss(ARCH, penalty_kind="none"), batch=nothing)
    assert float(loss) == 0.0
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), gradient)


def test_base_gets_no_gradient_by_construction():
    static = make_loss(ARCH)
    counts = count_tokens(static, BATCH)

    @jax.jit
    @jax.grad
    def to_base(base):
        return loss_sum(static, VALUE, base, BATCH, counts=counts)[0]

    gradient = to_base(BASE)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), gradient)


def test_a_zeroed_head_gives_the_loss_of_the_base_alone():
    static = make_loss(ARCH, penalty_kind="none")
    alone = make_loss(ARCH, alone=True)
    (loss, aux), _ = run(static, params=zero_head(BASE))
    (base_loss, _), _ = run(alone, params=BASE, base=None)
    assert float(loss) == float(base_loss)
    assert float(aux["magnitude"]) == 0.0


def test_evaluation_sums_give_base_and_composition_at_once():
    static = make_loss(ARCH)
    counts = count_tokens(static, BATCH)
    evaluate = jax.jit(
        lambda: loss_sum(static, VALUE, BASE, BATCH, counts=counts, with_base=True)[2]
    )
    aux = evaluate()
    (base_loss, base_aux), _ = run(make_loss(ARCH, alone=True), params=BASE, base=None)
    assert float(aux["base_nll"] / counts.objective) == pytest.approx(float(base_loss), rel=1e-6)
    assert float(aux["base_correct"]) == float(base_aux["correct"])
    assert float(aux["base_nll"]) != float(aux["nll"])


def test_accuracy_counts_targets_with_the_largest_logit():
    logits, _ = whole_logits("residual")(BATCH.tokens, BATCH.tokens)
    best = jnp.argmax(logits[..., :VOCAB], axis=-1).astype(jnp.int32)
    half = jnp.where(jnp.arange(12)[None, :] % 2 == 0, best, (best + 1) % VOCAB)
    (_, aux), _ = run(
        make_loss(ARCH, alone=True), params=BASE, base=None, batch=BATCH._replace(targets=half)
    )
    even = jnp.sum(BATCH.loss_mask[:, ::2])
    assert float(aux["correct"]) == float(even)


def test_tokens_the_value_does_not_have_keep_the_logit_of_the_base():
    """A base that appended tokens: the value adds nothing to them, and learns nothing from them."""
    static = make_loss(ARCH, value_vocab_size=50, unknown_ids=(7,), penalty_kind="none")
    unread = (BATCH.tokens >= 50) | (BATCH.tokens == 7)
    base, value = whole_logits("residual")(BATCH.tokens, jnp.where(unread, 0, BATCH.tokens))
    known = (jnp.arange(64) < 50) & (jnp.arange(64) != 7)
    z = (base + jnp.where(known[None, None, :], value, 0.0))[..., :VOCAB]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(z), BATCH.targets[..., None], axis=-1)[..., 0]
    expected = jnp.sum(jnp.where(BATCH.loss_mask, nll, 0.0)) / jnp.sum(
        BATCH.loss_mask, dtype=jnp.float32
    )
    (loss, _), gradient = run(static)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(gradient["lm_head"]["kernel"][:, 50:], 0.0)
    np.testing.assert_array_equal(gradient["lm_head"]["kernel"][:, 7], 0.0)


@pytest.mark.parametrize("connection", ["residual", "cascade"])
def test_in_bfloat16_nothing_is_multiplied_in_float32_forward_or_backward(connection):
    static = make_loss(ARCH, connection=connection, chunk_length=4, compute_dtype=jnp.bfloat16)
    counts = count_tokens(static, BATCH)

    def total(params):
        return loss_sum(static, params, BASE, BATCH, counts=counts)[0]

    factors = multiplied_dtypes(jax.make_jaxpr(jax.grad(total))(VALUE).jaxpr)
    assert len(factors) > 2 * 3 * 7  # two factors, forward and two gradients, seven kernels a layer
    assert set(factors) == {"bfloat16"}


def test_a_penalty_without_a_base_is_an_error():
    with pytest.raises(ValueError, match="without a base"):
        make_loss(ARCH, alone=True, penalty_kind="l1")
    with pytest.raises(ValueError, match="base_params"):
        run(make_loss(ARCH), base=None)


def test_a_penalty_does_not_replace_the_weight_that_an_objective_gives_to_the_same_score():
    both = dataclasses.replace(SFT, name="shrink", scores=("log_prob", "value_l1"))
    static = make_loss(ARCH, penalty_kind="l2")
    assert dataclasses.replace(static, objective=both).objective is both
    with pytest.raises(ValueError, match="the objective shrink weighs the score value_l1 itself"):
        dataclasses.replace(static, objective=both, penalty_kind="l1")


def test_chunks_are_even_and_within_the_budget():
    choose = functools.partial(choose_chunk_length, min_tokens=1)
    assert choose(8, 256, 2048, max_logits=1 << 21) == 128
    assert choose(8, 255, 2048, max_logits=1 << 21) == 128
    assert choose(8, 256, 2048, max_logits=1 << 30) == 256
    assert choose(8, 256, 200_000, max_logits=1) == 1
    size = choose(2, 100, 1000, max_logits=2 * 1000 * 30)
    assert size == math.ceil(100 / 4)


def test_a_large_vocabulary_makes_no_chunk_thinner_than_what_pays():
    assert choose_chunk_length(2, 2048, 128_256, max_logits=1 << 21, min_tokens=128) == 64
    assert choose_chunk_length(2, 48, 128_256, max_logits=1 << 21, min_tokens=128) == 48
