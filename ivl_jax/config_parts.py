"""The tables of a configuration: base, value, data, penalty, optimizer, mesh, step, logging.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed; `ivl_jax.config` puts them together and is where they are imported from. No JAX.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ivl_jax.extensions import is_extension

DType = Literal["float32", "bfloat16"]
CONNECTIONS = ("residual", "cascade", "cascade_no_text", "hidden", "linear")
PenaltyKind = Literal["none", "l1", "l2"]
PenaltyPositions = Literal["real", "all"]
LayoutName = Literal["full", "fsdp", "tensor", "replicated"]
DemonstrationFormat = Literal["sharegpt", "messages", "alpaca", "prompt_completion", "fields"]


class ConfigError(ValueError):
    """A configuration value that cannot be used: what, where, expected, found, remedy."""


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def is_connection(name: str) -> bool:
    """Whether a connection scheme may have this name: one of the package's, or the user's own."""
    return name in CONNECTIONS or is_extension(name)


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base beside which the value network is trained; several: `[[bases]]` in TOML."""

    path: str = ""
    """Hugging Face folder or hub id of the base model."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    param_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the frozen parameters are held; bfloat16 halves memory on accelerators, int8 (kernels
    alone, a scale for each output feature) nearly halves it again."""
    layout: LayoutName = "full"
    """Mesh axes that split its parameters: `full` is fsdp and tensor, `replicated` is none."""
    cache_states: bool = False
    """Write its final hidden states beside the demonstrations once, and never run it again."""
    weight: float = 1.0
    """With several bases: its share of the batches, relative to the other weights."""

    def __post_init__(self) -> None:
        """Check the weight."""
        require(0 < self.weight < math.inf, f"a base's weight must be > 0, got {self.weight}")


@dataclass(frozen=True)
class ValueConfig:
    """The value network: where its parameters come from and how it is connected to the base."""

    init: Literal["pretrained", "scratch", "base"] = "pretrained"
    """`pretrained`: the weights at `path`; `scratch`: random weights, the architecture of `path`;
    `base`: the base's own weights with an untied, zeroed head (so z = z_base at step 0)."""
    path: str = ""
    """Hugging Face folder or hub id; unused with `init = "base"`."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    connection: str = "residual"
    """How base and value are connected: `residual` (the paper's choice) reads text only, `cascade`
    and `cascade_no_text` read base predictions, `hidden` the base's final hidden states; `linear`
    is a matrix on base logits. Or `module:attribute` of a connection scheme of your own."""
    rank: int = 0
    """With `connection = "linear"`: width between its two matrices; 0: one V × V matrix."""
    layout: LayoutName = "full"
    """Mesh axes that split its parameters and moments; may differ from the base's."""

    def __post_init__(self) -> None:
        """Check that what is given is used."""
        require(
            is_connection(self.connection),
            f'value.connection = "{self.connection}": expected one of {", ".join(CONNECTIONS)}, or '
            "module:attribute of a connection scheme of your own",
        )
        if self.connection == "linear":
            require(
                self.init == "scratch" and not self.path,
                'value.connection = "linear" is a matrix without pre-trained weights: set '
                f'value.init = "scratch" and no value.path; got value.init = "{self.init}", '
                f'value.path = "{self.path}"',
            )
            require(self.rank >= 0, f"value.rank must be ≥ 0, got {self.rank}")
            return
        require(
            self.rank == 0,
            f"value.rank = {self.rank} cannot be combined with "
            f'value.connection = "{self.connection}"',
        )
        require(
            self.init != "base" or not self.path,
            f'value.path = "{self.path}" has no use with value.init = "base": remove one',
        )


@dataclass(frozen=True)
class DataConfig:
    """Demonstrations: where they are, what form they have, how they become batches."""

    train: tuple[str, ...] = ()
    """JSON or JSONL files, or one `tfds:NAME[/CONFIG][:SPLIT]`."""
    validation: tuple[str, ...] = ()
    """Held-out files or `tfds:` split; empty: `validation_fraction` of `train` is held out."""
    validation_fraction: float = 0.02
    """Share of `train` held out when `validation` is empty (paper: 2 %)."""
    group_field: str | None = None
    """Rows with equal values of this field stay on one side of the split."""
    format: DemonstrationFormat = "messages"
    """Row format; `fields` reads `user_template` and `assistant_template`."""
    user_template: str = ""
    """With `format = "fields"`: the user's message, for example `{question}`."""
    assistant_template: str = ""
    """With `format = "fields"`: the assistant's message, for example `{answer}`."""
    data_dir: str = "data_cache"
    """Where the ArrayRecord form of the demonstrations is stored."""
    chat_template: str = "auto"
    """`auto`: the tokenizer's own; or `llama-2`, `llama-3`, `chatml`, `vicuna`, `plain`."""
    max_length: int = 1024
    """Tokens a row of a batch; a longer dialogue is cut, counted and reported."""
    packing: bool = True
    """Put several demonstrations into one row; they never attend to each other."""
    max_malformed_fraction: float = 0.01
    """A larger share of malformed rows stops the run before training."""

    def __post_init__(self) -> None:
        """Check ranges and the fields that belong together."""
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}",
        )
        require(
            0 <= self.max_malformed_fraction <= 1,
            f"data.max_malformed_fraction must be in [0, 1], got {self.max_malformed_fraction}",
        )
        require(self.max_length >= 2, f"data.max_length must be at least 2, got {self.max_length}")
        templates = bool(self.user_template), bool(self.assistant_template)
        if self.format == "fields":
            require(
                all(templates),
                'data.format = "fields" needs data.user_template and data.assistant_template, '
                'for example "{question}" and "{answer}"',
            )
        else:
            require(
                not any(templates),
                "data.user_template and data.assistant_template are read only with "
                f'data.format = "fields", got data.format = "{self.format}"',
            )


@dataclass(frozen=True)
class PenaltyConfig:
    """λ · mean |z_value|: keeps the value small, which helps transfer (paper, section 4)."""

    kind: PenaltyKind = "l1"
    """`l1` is mean |z|, `l2` is mean z²."""
    weight: float = 1.0
    """λ; the authors' released code takes 1."""
    positions: PenaltyPositions = "real"
    """`real`: tokens that are not padding; `all`: also padding, as the authors' code does."""

    def __post_init__(self) -> None:
        """Check that λ is not negative."""
        require(self.weight >= 0, f"penalty.weight must be ≥ 0, got {self.weight}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults are the paper's."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_fraction: float = 0.01
    """Share of all steps in which the learning rate rises linearly to its peak."""
    final_fraction: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only (no norms, no biases)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_gradient_norm: float = 1.0
    """Global norm above which gradients are scaled down; 0 turns clipping off."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.learning_rate > 0, f"optimizer.learning_rate must be > 0, got {self.learning_rate}"
        )
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} must be in [0, 1], got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}")
        for name in ("weight_decay", "max_gradient_norm"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} must be ≥ 0, got {value}")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; −1 on at most one axis means all that are left."""

    data: int = 1
    """Copies of the model, each with its own rows of the batch."""
    fsdp: int = -1
    """Parameters and rows of the batch split over these devices."""
    tensor: int = 1
    """Heads, MLP width and vocabulary split over these devices."""

    def __post_init__(self) -> None:
        """Check sizes."""
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(size == -1 or size >= 1 for size in sizes) and sizes.count(-1) <= 1,
            "mesh sizes must be ≥ 1, or −1 on one axis for all devices left; got "
            f"data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}",
        )


@dataclass(frozen=True)
class StepConfig:
    """How much is trained and how one step is computed."""

    epochs: float = 3.0
    """Passes over the training demonstrations (paper: 3); ignored when `max_steps` is set."""
    max_steps: int = 0
    """Optimizer steps; 0: from `epochs`."""
    batch_size: int = 32
    """Rows of the global batch, over all devices and micro-batches (paper: 32)."""
    micro_batches: int = 1
    """The batch is computed in this many parts; the gradient equals that of the whole batch."""
    compute_dtype: DType = "float32"
    """Activations and matmuls; master weights, norms, softmax and loss stay in float32."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more work."""
    scan_layers: bool = False
    """Run the layers as one scanned loop: shorter compile time for deep models."""

    def __post_init__(self) -> None:
        """Check that micro-batches divide the batch."""
        require(self.epochs > 0, f"step.epochs must be > 0, got {self.epochs}")
        require(self.max_steps >= 0, f"step.max_steps must be ≥ 0, got {self.max_steps}")
        require(
            self.batch_size >= 1 and self.micro_batches >= 1,
            "step.batch_size and step.micro_batches must be ≥ 1, got "
            f"{self.batch_size} and {self.micro_batches}",
        )
        require(
            self.batch_size % self.micro_batches == 0,
            f"step.micro_batches = {self.micro_batches} does not divide "
            f"step.batch_size = {self.batch_size}",
        )


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported and saved while training."""

    log_every: int = 10
    """Steps between two records of metrics.jsonl, the console and TensorBoard."""
    evaluate_every: int = 200
    """Steps between two held-out evaluations; 0: only at the start and the end."""
    evaluation_rows: int = 512
    """Held-out batch rows an evaluation reads at most; 0: all."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; step 0 and the last step are always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, and besides them the best one (lowest held-out NLL). A resume takes
    the newest and falls back to an older one where that is damaged; 1 keeps none to fall back to,
    once the newest is on disk and checked."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(
                getattr(self, name) >= 1, f"logging.{name} must be ≥ 1, got {getattr(self, name)}"
            )
        for name in ("evaluate_every", "evaluation_rows"):
            require(
                getattr(self, name) >= 0, f"logging.{name} must be ≥ 0, got {getattr(self, name)}"
            )
