"""The head's gradient is summed over devices once, after the chunks of positions, on every mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed.network import ComposedParams, Layout, ValueArrays
from ivl_jax.config import DistilConfig, GrpoConfig, PreferenceConfig
from ivl_jax.sharding import LAYOUTS, batch_sharding, make_mesh, parameter_shardings
from ivl_jax.training.loss import count_tokens, loss_sum
from ivl_jax.training.objectives.distil import make_distil
from ivl_jax.training.objectives.dpo import make_dpo
from ivl_jax.training.objectives.grpo import make_grpo
from ivl_jax.training.objectives.sft import SFT
from ivl_jax.training.step import split_micro_batches
from tests.collectives import sums_over_devices
from tests.training.tiny import VOCAB_ROWS, make_arch, make_batch, make_loss, make_params

WIDTH = 32
CHUNK = 3  # of rows of 12: four chunks
ROWS = 8


@dataclass(frozen=True)
class Case:
    """One program: where it runs and what it minimises."""

    mesh: tuple[int, int, int]
    objective: Any = SFT
    micro_batches: int = 1
    alone: bool = False
    tied: bool = False
    layout: str = "full"
    scheme: str = "residual"


# Every objective on some mesh; each case is a compilation.
CASES = {
    "fsdp": Case((1, 4, 1)),
    "a sharded vocabulary, tied": Case((2, 1, 2), tied=True),
    "kto in micro-batches": Case((1, 2, 1), make_dpo(PreferenceConfig(loss="kto")), 2),
    "grpo, replicated": Case((1, 2, 1), make_grpo(GrpoConfig()), layout="replicated"),
    "a cascade": Case((2, 1, 1), scheme="cascade"),
    "distil, alone": Case((1, 2, 1), make_distil(DistilConfig()), alone=True),
}


def compiled(case: Case, mesh: Any) -> Any:
    """The gradient of a global batch's loss on a mesh."""
    arch = make_arch(hidden_size=WIDTH, num_hidden_layers=1, tie_word_embeddings=case.tied)
    layout = Layout(mesh, LAYOUTS[case.layout])
    taught = case.objective.needs_teacher
    loss = make_loss(
        arch,
        alone=case.alone,
        connection=case.scheme,
        layout=layout,
        base_layout=layout,
        objective=case.objective,
        chunk_length=CHUNK,
        teacher=make_loss(arch, layout=layout, base_layout=layout).composition if taught else None,
        teacher_strengths=(1.0,) if taught else (),
        **({"penalty_kind": "none"} if case.alone or taught else {}),
    )
    params = make_params(arch, 1)
    places = parameter_shardings(params, mesh, layout.rules)
    params, base = (jax.device_put(make_params(arch, seed), places) for seed in (1, 0))
    teacher = ComposedParams(base, (ValueArrays(params),)) if taught else None
    batch = make_batch(rows=ROWS)
    if case.objective.sampling is not None:
        batch = batch._replace(advantages=np.cos(np.arange(ROWS * 12.0, dtype=np.float32)))
        batch = batch._replace(advantages=batch.advantages.reshape(ROWS, 12))
    batch = split_micro_batches(batch, case.micro_batches)
    batch = jax.device_put(batch, batch_sharding(mesh, micro_batched=True))

    def gradient(params: Any, base: Any, batch: Any, teacher: Any) -> Any:
        counts = count_tokens(loss, batch)

        def one(micro: Any) -> Any:
            def total(params: Any) -> Any:
                frozen = None if case.alone else base
                found = loss_sum(loss, params, frozen, micro, counts=counts, teacher_params=teacher)
                return found[0]

            return jax.lax.with_sharding_constraint(jax.grad(total)(params), places)

        if case.micro_batches == 1:
            return one(jax.tree.map(lambda rows: rows[0], batch))
        zeros = jax.tree.map(jnp.zeros_like, params)
        add = lambda sums, micro: (jax.tree.map(jnp.add, sums, one(micro)), None)  # noqa: E731
        return jax.lax.scan(add, zeros, batch)[0]

    return jax.jit(gradient).lower(params, base, batch, teacher).compile()


QUICK = "a sharded vocabulary, tied"


@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_the_heads_gradient_is_summed_once_and_not_once_per_chunk(name: str) -> None:
    case = CASES[name]
    data, fsdp, tensor = case.mesh
    devices = jax.devices()[: data * fsdp * tensor]
    program = compiled(case, make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices))
    micro_batches_loop = int(case.micro_batches > 1)
    as_large_as_a_head = WIDTH * VOCAB_ROWS // tensor
    depths = [
        depth for depth, size in sums_over_devices(program.as_text()) if size >= as_large_as_a_head
    ]
    assert depths
    assert set(depths) == {micro_batches_loop}
