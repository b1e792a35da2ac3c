"""Our training step and the PyTorch peer's, with random weights and tokens.

In: shapes. Out: functions that take one step per call. Every position is a real token and a target,
as in a batch packed with answers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from benchmarks.shapes import draw_params
from ivl_jax.composed.attention import attention_on_device
from ivl_jax.composed.network import Composition, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.config import PenaltyKind
from ivl_jax.data.batching import Batch
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params, build_decoder, init_params
from ivl_jax.sharding import parameter_shardings, place_batch, single_device_mesh
from ivl_jax.training.loss import Loss
from ivl_jax.training.objectives import Objective
from ivl_jax.training.objectives.sft import SFT
from ivl_jax.training.optimizer import Schedules, make_optimizer, make_schedule
from ivl_jax.training.programs import default_chunk_length
from ivl_jax.training.step import (
    init_state,
    make_train_step,
    split_micro_batches,
    state_shardings,
)

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01


class Sizes(NamedTuple):
    """Sizes of a batch."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Positions of a batch."""
        return self.rows * self.length


class OurStep:
    """The compiled step of a value network with a frozen base, and its state.

    Attributes:
        chunk_length: Positions whose logits exist at once.
    """

    def __init__(
        self,
        base: ArchConfig,
        value: ArchConfig,
        sizes: Sizes,
        *,
        penalty: PenaltyKind = "none",
        chunk_length: int | None = None,
        bfloat16: bool = False,
        compact: bool = False,
        objective: Objective = SFT,
        segments: int = 1,
        cached_states: bool = False,
    ):
        """Build it.

        Args:
            base: the frozen base's shape.
            value: the value network's.
            sizes: of the batch.
            penalty: on the value logits, with λ = 1.
            chunk_length: positions whose logits exist at once; None: train.py's choice.
            bfloat16: store the base and multiply in bfloat16; master weights stay float32.
            compact: layers as a scan with recomputed activations, for deep networks.
            objective: what the loss is.
            segments: dialogues per row.
            cached_states: the base's final hidden states come with the batch.
        """
        mesh = single_device_mesh()
        vocabulary, dtype = value.vocab_size, jnp.bfloat16 if bfloat16 else jnp.float32
        if chunk_length is None:
            chunk_length = default_chunk_length(
                sizes.rows, sizes.length, vocabulary, platform=mesh.devices.flat[0].platform
            )
        self.chunk_length = chunk_length
        networks = [
            Network(
                build_decoder(
                    arch,
                    compute_dtype=dtype,
                    remat="full" if compact else "none",
                    scan_layers=compact,
                    attention=attention_on_device(arch, mesh.devices.flat[0], dtype=dtype),
                ),
                arch,
                vocabulary,
                scheme=scheme,
            )
            for arch, scheme in ((base, None), (value, SCHEMES["residual"]))
        ]
        loss = Loss(
            Composition(networks[0], (networks[1],)),
            penalty_kind=penalty,
            penalty_weight=0.0 if penalty == "none" else 1.0,
            chunk_length=chunk_length,
            objective=objective,
        )
        schedule = make_schedule(
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_fraction=0.0,
            final_fraction=0.0,
            total_steps=1000,
        )
        optimizer = make_optimizer(
            schedule,
            weight_decay=WEIGHT_DECAY,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            max_gradient_norm=0.0,
        )
        shapes = [abstract_params(arch, scan_layers=compact) for arch in (base, value)]
        places = [parameter_shardings(shape, mesh) for shape in shapes]
        shardings = state_shardings(shapes[1], places[1], optimizer, mesh)
        step: Any = make_train_step(
            loss,
            optimizer,
            Schedules(schedule),
            shardings=shardings,
            base_shardings=places[0],
            mesh=mesh,
        )
        batch = random_batch(vocabulary, sizes, segments=segments)
        if cached_states:
            states = np.random.default_rng(1).standard_normal(
                (sizes.rows, sizes.length, base.hidden_size), np.float32
            )
            batch = batch._replace(base_states=states)
        batch = split_micro_batches(batch, 1)
        self._batch = place_batch(batch, mesh, micro_batched=True)
        if compact:
            frozen = abstract_params(base, param_dtype=dtype, scan_layers=True)
            self._base_params, params = draw_params(frozen, 0), draw_params(shapes[1], 1)
        else:
            self._base_params = random_params(base, 0, dtype=dtype)
            params = random_params(value, 1)
        self._state = init_state(params, optimizer, jax.random.key(0), shardings)
        self._compiled = step.lower(self._state, self._base_params, self._batch).compile()

    def temporary_bytes(self) -> int:
        """The compiled step's peak temporaries, in bytes."""
        return self._compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        """Take one step and return its loss."""
        self._state, metrics = self._compiled(self._state, self._base_params, self._batch)
        return metrics["loss"]


def random_params(arch: ArchConfig, seed: int, *, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Random parameters of a shape."""
    make = functools.partial(init_params, arch, param_dtype=dtype)
    return jax.jit(make)(jax.random.key(seed))


def random_batch(vocabulary: int, sizes: Sizes, *, segments: int = 1) -> Batch:
    """Rows of equal segments, of which every target counts, each row better than the one before."""
    tokens = random_tokens(vocabulary, sizes)
    shape, length = (sizes.rows, sizes.length), sizes.length // segments
    places = np.arange(sizes.length, dtype=np.int32)
    better = np.linspace(-1, 1, sizes.rows, dtype=np.float32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones(shape, bool),
        positions=np.broadcast_to(places % length, shape),
        segment_ids=np.broadcast_to(places // length + 1, shape),
        advantages=np.repeat(better[:, None], sizes.length, axis=1),
    )


def random_tokens(vocabulary: int, sizes: Sizes) -> np.ndarray:
    """Token ids, one more per row than positions."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, (sizes.rows, sizes.length + 1)).astype(np.int32)


def torch_train(
    base: ArchConfig, value: ArchConfig, sizes: Sizes, *, bfloat16: bool, threads: int
) -> Callable[[], float]:
    """The peer: two models of transformers, logits added, cross-entropy, AdamW.

    Args:
        base: the frozen base's shape.
        value: the value network's.
        sizes: of the batch.
        bfloat16: store the base in bfloat16 and run the value under autocast; master weights stay
            float32. Otherwise everything is float32.
        threads: of PyTorch.

    Returns:
        A function that takes one step and returns its loss.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    models = [LlamaForCausalLM(LlamaConfig(**arch.to_hf())) for arch in (base, value)]
    frozen, trained = models[0].eval().requires_grad_(False), models[1].train()
    if bfloat16:
        frozen = frozen.bfloat16()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    tokens = torch.from_numpy(random_tokens(value.vocab_size, sizes)).long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                base_logits = frozen(inputs, use_cache=False).logits
            logits = trained(inputs, use_cache=False).logits + base_logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1)
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def model_flops(base: ArchConfig, value: ArchConfig, sizes: Sizes, *, base_runs: bool) -> float:
    """Arithmetic of one step: forward of the base, forward and backward of the value network.

    Matrix products and attention; each multiply-add counts as two. Recomputation is not counted.

    Args:
        base: the frozen base's shape.
        value: the value network's.
        sizes: of the batch.
        base_runs: False counts only the base's head, as with cached states.

    Returns:
        Floating-point operations.
    """

    def layers(arch: ArchConfig) -> float:
        width, inner = arch.hidden_size, arch.intermediate_size
        queries = arch.num_attention_heads * arch.head_dim
        keys = arch.num_key_value_heads * arch.head_dim
        matrices = 2 * width * queries + 2 * width * keys + 3 * width * inner
        attention = 2 * sizes.length * queries
        return 2 * arch.num_hidden_layers * (matrices + attention)

    def head(arch: ArchConfig) -> float:
        return 2 * arch.hidden_size * arch.vocab_size

    forward = head(base) + (layers(base) if base_runs else 0)
    return sizes.tokens * (forward + 3 * (layers(value) + head(value)))


def matrix_product(size: int) -> Callable[[], Any]:
    """A square float32 product, which measures the machine's limit."""
    matrix = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(matrix, matrix)
