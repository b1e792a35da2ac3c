"""The backward pass keeps nothing of a frozen base."""

import jax
import pytest

from ivl_jax.composed.network import Composition, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.model.decoder import build_decoder
from ivl_jax.training.loss import Loss, count_tokens, loss_sum
from tests.training.tiny import VOCAB, make_arch, make_batch, make_params, on_device

ROWS, LENGTH = 4, 12
BASE = make_arch(hidden_size=56, intermediate_size=112, num_hidden_layers=3)  # sizes of its own
VALUE = make_arch()


@pytest.mark.parametrize("connection", ["residual", "cascade"])
def test_nothing_of_a_frozen_base_is_kept_for_the_backward_pass(connection):
    base = Network(build_decoder(BASE), BASE, VOCAB)
    value = Network(build_decoder(VALUE), VALUE, VOCAB, scheme=SCHEMES[connection])
    loss = Loss(Composition(base, (value,)), penalty_kind="l1", penalty_weight=0.1)
    batch = on_device(make_batch(rows=ROWS, length=LENGTH))
    counts = count_tokens(loss, batch)
    base_params = make_params(BASE, 0)

    def kept(params):
        total = lambda trained: loss_sum(loss, trained, base_params, batch, counts=counts)[0]  # noqa: E731
        return jax.vjp(total, params)[1]  # a tree of what it keeps

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, make_params(VALUE, 1)))]
    assert not [shape for shape in shapes if set(shape) & {56, 112}]
    assert any(
        set(shape) & {16, 32} and LENGTH in shape for shape in shapes
    )  # the value's are kept
