"""The config of a training run: its tables, with their defaults, help texts and checks.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import ConfigError, found, remote_problem, require, require_numbers
from ivl_jax.config.data import DataConfig
from ivl_jax.config.model import DType, LayoutName, MeshConfig, ModelConfig, RuntimeConfig
from ivl_jax.config.objectives import DistilConfig, GrpoConfig, PreferenceConfig
from ivl_jax.config.processes import ProcessesConfig
from ivl_jax.config.value import ValueConfig

PenaltyKind = Literal["none", "l1", "l2"]
PenaltyPositions = Literal["real", "all"]
PenaltySchedule = Literal["constant", "linear_warmup", "linear_decay"]


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base that the value network is trained with; several: `[[bases]]` in TOML."""

    path: str = ""
    """Hugging Face folder or hub id of the base model."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    param_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the frozen parameters are stored; bfloat16 halves memory on accelerators, int8 (kernels
    only, one scale per output feature) nearly halves it again."""
    layout: LayoutName = "full"
    """Mesh axes that split its parameters: `full` is fsdp and tensor, `replicated` is none."""
    cache_states: bool = False
    """Store its final hidden states with the demonstrations once, and never run it again."""
    weight: float = 1.0
    """With several bases: its share of the batches, relative to the other weights."""

    def __post_init__(self) -> None:
        """Check the weight."""
        require_numbers(self, "base.")
        require(0 < self.weight < math.inf, f"a base's weight must be > 0, got {self.weight}")


@dataclass(frozen=True)
class PenaltyConfig:
    """λ · mean |z_value|: keeps the value small, which helps transfer (paper, section 4)."""

    kind: PenaltyKind = "l1"
    """`l1` is mean |z|, `l2` is mean z²."""
    weight: float = 1.0
    """λ; the authors' released code uses 1."""
    positions: PenaltyPositions = "real"
    """`real`: tokens that are not padding; `all`: also padding, as in the authors' code."""
    schedule: PenaltySchedule = "constant"
    """Over all steps: λ throughout, rising linearly from 0 to λ, or falling from λ to 0."""

    def __post_init__(self) -> None:
        """Check that λ is not negative."""
        require_numbers(self, "penalty.")
        require(self.weight >= 0, f"penalty.weight must be ≥ 0, got {self.weight}")


@dataclass(frozen=True)
class AugmentationConfig:
    """What is varied in training so that the value does not depend on this one base.

    Each dialogue draws anew at each step; evaluations see the base as it is.
    """

    base_temperature: float = 1.0
    """τ: the base's logits are divided by a temperature, log-uniform in [1/τ, τ]; 1: they are not.
    """
    base_dropout: float = 0.0
    """Share of dialogues that are learned without the base: its logits are 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "augmentation.")
        require(
            1 <= self.base_temperature < math.inf,
            "augmentation.base_temperature must be ≥ 1 and finite, the largest temperature (1 "
            f"turns it off), got {self.base_temperature}",
        )
        require(
            0 <= self.base_dropout < 1,
            "augmentation.base_dropout must be in [0, 1), a share of dialogues (0 turns it off), "
            f"got {self.base_dropout}",
        )

    @property
    def shown(self) -> str:
        """What is varied, for messages; empty: nothing."""
        fields = (f"augmentation.{name} = {value}" for name, value in vars(self).items())
        return ", ".join(fields) if self != AugmentationConfig() else ""


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
    """Added to the square root of the second moment."""
    max_gradient_norm: float = 1.0
    """Global norm above which gradients are scaled down; 0 turns clipping off."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """How both moments are stored; bfloat16 saves 4 bytes per trained parameter."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "optimizer.")
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
class StepConfig:
    """How long to train and how a step is computed."""

    epochs: float = 3.0
    """Passes over the training demonstrations (paper: 3); ignored when `max_steps` is set."""
    max_steps: int = 0
    """Optimizer steps; 0: from `epochs`."""
    batch_size: int = 32
    """Rows of the global batch, over all devices and micro-batches (paper: 32)."""
    micro_batches: int = 1
    """Parts in which the batch is computed; the gradient equals that of the whole batch."""
    compute_dtype: DType = "float32"
    """Activations and matmuls; master weights, norms, softmax and loss stay in float32."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """What is computed again in the backward pass: `none`; `full`: each layer, for the least memory
    and a third more work; `dots`: all but matrix products and attention; `auto`: as memory asks."""
    scan_layers: bool = False
    """Run the layers as one scan: shorter compile time for deep models."""

    def __post_init__(self) -> None:
        """Check that micro-batches divide the batch."""
        require_numbers(self, "step.")
        require(
            self.compute_dtype != "float16",
            'step.compute_dtype = "float16": gradients below 6e-8 would become 0 without loss '
            'scaling, which training does not do; use "bfloat16", or "float32" on a GPU without it',
        )
        require(
            not isinstance(self.remat, bool),
            f'step.remat = {self.remat}: expected "auto", "none", "full" or "dots"; False and True '
            'are now "none" and "full"',
        )
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


TrackerName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported and saved during training."""

    log_every: int = 10
    """Steps between two records in metrics.jsonl, on the console and in the trackers."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where figures can be watched: `tensorboard`, `wandb` (Weights & Biases, extra `wandb`)."""
    evaluate_every: int = 200
    """Steps between two held-out evaluations; 0: only at the start and the end."""
    evaluation_rows: int = 512
    """The most held-out batch rows that an evaluation reads; 0: all."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; step 0 and the last step are always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, in addition to the best one on held-out rows (lowest NLL, preference
    loss or divergence, or highest reward, as the objective has it). A resume uses the newest and
    falls back to an older one if it is damaged; 1 keeps none to fall back to, once the newest is on
    disk and checked."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "logging.")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(
                getattr(self, name) >= 1, f"logging.{name} must be ≥ 1, got {getattr(self, name)}"
            )
        for name in ("evaluate_every", "evaluation_rows"):
            require(
                getattr(self, name) >= 0, f"logging.{name} must be ≥ 0, got {getattr(self, name)}"
            )
        require(
            len(set(self.trackers)) == len(self.trackers),
            f"logging.trackers names one twice: {', '.join(self.trackers)}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: str = ""
    """Folder of the run: config, versions, metrics, checkpoints and the final value folder."""
    objective: str = "sft"
    """What is minimised: `sft` (cross-entropy of demonstrations), `dpo` (preferences), `distil`
    (a teacher's predictions), `grpo` (rewards of sampled answers), or `module:attribute` of an
    objective of your own."""
    method: Literal["value", "sft"] = "value"
    """`value`: train a value network with a frozen base; `sft`: fine-tune the base itself."""
    seed: int = 0
    """Seed of initialisation, of the order of demonstrations, and of sampled answers."""
    resume: bool = False
    """Resume from the newest intact checkpoint of `run_dir`."""
    distributed: bool = False
    """Several processes, on one or more hosts, compute as one; see `[processes]`."""
    runtime: Inline[RuntimeConfig] = field(default_factory=RuntimeConfig)
    profile: str = ""
    """Write a trace of the third to seventh step to this folder, for TensorBoard or xprof."""
    base: BaseConfig = field(default_factory=BaseConfig)
    bases: tuple[BaseConfig, ...] = ()
    """Train with several bases instead of `base`, alternating per batch (TOML: `[[bases]]`)."""
    value: ValueConfig = field(default_factory=ValueConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: StepConfig = field(default_factory=StepConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)

    @property
    def all_bases(self) -> tuple[BaseConfig, ...]:
        """`bases`, or the one `base`."""
        return self.bases or (self.base,)

    @property
    def trained_layout(self) -> LayoutName:
        """Mesh axes that split the parameters that are trained."""
        return self.base.layout if self.method == "sft" else self.value.layout

    def __post_init__(self) -> None:
        """Check the seed."""
        require(
            0 <= self.seed < 2**32,
            f"seed must be in [0, 2³²), {found(self.seed)}",
        )


def check_train_config(config: TrainConfig) -> None:
    """Check that the config is complete and consistent.

    Raises:
        ConfigError: a required field is empty, or fields conflict; lists all problems.
    """
    problems = []
    if not config.run_dir:
        problems.append('run_dir is empty: name a folder, for example run_dir = "runs/mine"')
    problems += _base_problems(config)
    if not config.data.train:
        problems.append('data.train is empty: name JSON/JSONL files or "tfds:NAME"')
    needs_path = config.value.init != "base" and config.value.connection != "linear"
    if config.method == "value" and needs_path and not config.value.path:
        problems.append(
            f'value.path is empty and value.init = "{config.value.init}" needs it: name a Hugging '
            'Face folder or hub id, or set value.init = "base"'
        )
    if problem := remote_problem("profile", config.profile):
        problems.append(problem)
    if "://" in config.data.data_dir and any(base.cache_states for base in config.all_bases):
        problems.append(
            f"cache_states = true needs a local data.data_dir, got {config.data.data_dir}: cached "
            "states are read from the disk at every step"
        )
    if problems:
        raise ConfigError(
            "this run cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )


def _base_problems(config: TrainConfig) -> list[str]:
    problems = []
    if config.bases and config.base.path:
        problems.append(
            f'base.path = "{config.base.path}" cannot be combined with [[bases]]: make it one of '
            "them"
        )
    names = [f"bases[{index}].path" for index in range(len(config.bases))] or ["base.path"]
    paths = [base.path for base in config.all_bases]
    problems += [
        f"{name} is empty: name a Hugging Face folder or hub id"
        for name, path in zip(names, paths, strict=True)
        if not path
    ]
    if repeated := {path for path in paths if path and paths.count(path) > 1}:
        problems.append(
            f"[[bases]] names {', '.join(sorted(repeated))} more than once: use its weight"
        )
    if config.distributed and any(base.cache_states for base in config.all_bases):
        problems.append(
            "cache_states = true needs distributed = false: the dialogues that a process reads "
            "change with each shuffle, and hosts may have separate disks"
        )
    if config.method == "sft":
        if config.bases:
            problems.append('method = "sft" fine-tunes one model: name it in [base], not [[bases]]')
        if config.base.cache_states:
            problems.append(
                'base.cache_states cannot be combined with method = "sft": the states change at '
                "every step"
            )
        if config.base.param_dtype != "float32":
            problems.append(
                f'base.param_dtype = "{config.base.param_dtype}" cannot be combined with method = '
                '"sft": trained parameters are stored in float32; see step.compute_dtype'
            )
        if shown := config.augmentation.shown:
            problems.append(
                f'{shown} cannot be combined with method = "sft", which has no frozen base to '
                "vary: leave them at 1 and 0"
            )
        if config.value.lora.rank:
            problems.append(
                f"value.lora.rank = {config.value.lora.rank} cannot be combined with method = "
                '"sft": adapters are those of a value network'
            )
        if config.value.depths > 1:
            problems.append(
                f"value.depths = {config.value.depths} cannot be combined with method = "
                '"sft": it changes the head of a value network'
            )
    return problems
