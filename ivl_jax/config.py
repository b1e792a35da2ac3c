"""Every configuration dataclass, with its defaults, its help texts and its checks.

In: values from a TOML file (config_files.py) or the command line. Out: frozen dataclasses whose
cross-field checks have passed. Imports no JAX, so that `--help` stays fast.
"""

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["float32", "bfloat16"]
Connection = Literal["residual", "cascade", "cascade_no_text"]
PenaltyKind = Literal["none", "l1", "l2"]
PenaltyPositions = Literal["real", "all"]
LayoutName = Literal["full", "fsdp", "tensor", "replicated"]
DemonstrationFormat = Literal["sharegpt", "messages", "alpaca", "prompt_completion", "fields"]


class ConfigError(ValueError):
    """A configuration value that cannot be used: what, where, expected, found, remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base model beside which the value network is trained."""

    path: str = ""
    """Hugging Face folder or hub id of the base model."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    param_dtype: DType = "float32"
    """How the frozen parameters are held; bfloat16 halves memory on accelerators."""
    layout: LayoutName = "full"
    """Mesh axes that split its parameters: `full` is fsdp and tensor, `replicated` is none."""


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
    connection: Connection = "residual"
    """How base and value are connected; `residual` (the paper's choice) reads text only."""
    layout: LayoutName = "full"
    """Mesh axes that split its parameters and moments; may differ from the base's."""

    def __post_init__(self) -> None:
        """Check that a path is given exactly when it is needed."""
        if self.init == "base":
            _require(
                not self.path,
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
        _require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}",
        )
        _require(
            0 <= self.max_malformed_fraction <= 1,
            f"data.max_malformed_fraction must be in [0, 1], got {self.max_malformed_fraction}",
        )
        _require(self.max_length >= 2, f"data.max_length must be at least 2, got {self.max_length}")
        templates = bool(self.user_template), bool(self.assistant_template)
        if self.format == "fields":
            _require(
                all(templates),
                'data.format = "fields" needs data.user_template and data.assistant_template, '
                'for example "{question}" and "{answer}"',
            )
        else:
            _require(
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
        _require(self.weight >= 0, f"penalty.weight must be ≥ 0, got {self.weight}")


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
        _require(
            self.learning_rate > 0, f"optimizer.learning_rate must be > 0, got {self.learning_rate}"
        )
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name} must be in [0, 1], got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}")
        for name in ("weight_decay", "max_gradient_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} must be ≥ 0, got {value}")


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
        _require(
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
        _require(self.epochs > 0, f"step.epochs must be > 0, got {self.epochs}")
        _require(self.max_steps >= 0, f"step.max_steps must be ≥ 0, got {self.max_steps}")
        _require(
            self.batch_size >= 1 and self.micro_batches >= 1,
            "step.batch_size and step.micro_batches must be ≥ 1, got "
            f"{self.batch_size} and {self.micro_batches}",
        )
        _require(
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
    """Newest checkpoints kept, besides the best one (lowest held-out NLL)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            _require(
                getattr(self, name) >= 1, f"logging.{name} must be ≥ 1, got {getattr(self, name)}"
            )
        for name in ("evaluate_every", "evaluation_rows"):
            _require(
                getattr(self, name) >= 0, f"logging.{name} must be ≥ 0, got {getattr(self, name)}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: str = ""
    """Folder of the run: config, versions, metrics, checkpoints and the final value folder."""
    method: Literal["value", "sft"] = "value"
    """`value`: train a value network beside the frozen base; `sft`: fine-tune the base itself."""
    seed: int = 0
    """Seed of initialisation and of the order of demonstrations."""
    resume: bool = False
    """Go on from the newest sound checkpoint of `run_dir`."""
    distributed: bool = False
    """Call `jax.distributed.initialize` first (several hosts)."""
    compilation_cache: str = ""
    """Folder of JAX's persistent compilation cache; empty: none."""
    base: BaseConfig = field(default_factory=BaseConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    data: DataConfig = field(default_factory=DataConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: StepConfig = field(default_factory=StepConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def check_train_config(config: TrainConfig) -> None:
    """Check what a run cannot start without.

    Raises:
        ConfigError: a required field is empty; lists all of them.
    """
    problems = []
    if not config.run_dir:
        problems.append('run_dir is empty: name a folder, for example run_dir = "runs/mine"')
    if not config.base.path:
        problems.append("base.path is empty: name a Hugging Face folder or hub id")
    if not config.data.train:
        problems.append('data.train is empty: name JSON/JSONL files or "tfds:NAME"')
    if config.method == "value" and config.value.init != "base" and not config.value.path:
        problems.append(
            f'value.path is empty and value.init = "{config.value.init}" needs it: name a Hugging '
            'Face folder or hub id, or set value.init = "base"'
        )
    if problems:
        raise ConfigError(
            "this run cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )


@dataclass(frozen=True)
class InferConfig:
    """Decode with a base model and, unless `--value none`, value networks on top."""

    base: str = ""
    """Hugging Face folder or hub id of the base model."""
    value: tuple[str, ...] = ()
    """Value folder written by train.py, or `none` for the base alone; repeat the flag for several.
    A language model (Hugging Face folder or hub id) counts as a value: `--value TUNED
    --value UNTUNED --strength 1 --strength -1` is proxy-tuning."""
    strength: tuple[float, ...] = ()
    """α in z = z_base + Σ α · z_value, one a value in their order (default 1); 0 gives the base,
    negative values push away."""
    map: tuple[str, ...] = ()
    """Vocabulary map of a value with another tokenizer than the base's, built by
    `python -m ivl_jax.vocabulary build`; one a value in their order, `none` for those without."""
    prompt: str | None = None
    """One prompt; "" starts from the beginning-of-sequence token."""
    input: str | None = None
    """JSONL file with one {"prompt": …} or {"messages": […]} a line, perhaps with its own
    "strengths": […], one a value; needs --output."""
    output: str | None = None
    """JSONL file written as it goes; a second run continues where it stopped."""
    chat: bool = False
    """Treat prompts as user messages in the first value's template; without a prompt, talk."""
    max_new_tokens: int = 256
    """Tokens generated at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability mass."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability."""
    seed: int = 0
    """Seed of sampling; row i of an input file uses it with i folded in."""
    stop: tuple[str, ...] = ()
    """String that ends the generation and is cut off; repeat the flag for several."""
    batch_size: int = 8
    """Prompts decoded together, with --input."""
    dtype: DType = "float32"
    """Parameters and computation; logits are always composed in float32."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1, tensor=-1))
    base_layout: LayoutName = "full"
    """How the base's parameters are split on the mesh; `full`: over fsdp and tensor."""
    value_layout: LayoutName = "full"
    """The same for the value networks; `replicated` keeps small ones whole on every device."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            self.max_new_tokens >= 1, f"--max-new-tokens must be ≥ 1, got {self.max_new_tokens}"
        )
        _require(self.temperature >= 0, f"--temperature must be ≥ 0, got {self.temperature}")
        _require(self.top_k >= 0, f"--top-k must be ≥ 0, got {self.top_k}")
        _require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], got {self.top_p}")
        _require(0 <= self.min_p < 1, f"--min-p must be in [0, 1), got {self.min_p}")
        _require(self.batch_size >= 1, f"--batch-size must be ≥ 1, got {self.batch_size}")


def check_infer_config(config: InferConfig) -> None:
    """Check what decoding cannot start without.

    Raises:
        ConfigError: flags that are missing or exclude each other; lists all of them.
    """
    problems = []
    if not config.base:
        problems.append("--base is missing: name a Hugging Face folder or hub id")
    if not config.value:
        problems.append("--value is missing: name a value folder, or none for the base alone")
    problems += _value_flag_problems(config)
    if config.prompt is not None and config.input is not None:
        problems.append("--prompt and --input exclude each other: remove one")
    if config.prompt is None and config.input is None and not config.chat:
        problems.append("nothing to decode: give --prompt, --input with --output, or --chat")
    if (config.input is None) != (config.output is None):
        problems.append("--input and --output belong together: give both or none")
    if config.input is not None and config.input == config.output:
        problems.append(f"--input and --output are the same file, {config.input}: name another")
    if any(not string for string in config.stop):
        problems.append("--stop holds an empty string: remove it")
    if problems:
        raise ConfigError(
            "decoding cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )


def _value_flag_problems(config: InferConfig) -> list[str]:
    """What is wrong with --value, --strength and --map beside one another."""
    if "none" in config.value:
        unused = [f"--value {path}" for path in config.value if path != "none"]
        unused += [f"--strength {alpha}" for alpha in config.strength]
        unused += [f"--map {path}" for path in config.map if path != "none"]
        return [f"{', '.join(unused)} has no use with --value none: remove one"] if unused else []
    problems = []
    for flag, given in (("--strength", config.strength), ("--map", config.map)):
        if config.value and given and len(given) != len(config.value):
            problems.append(
                f"{len(config.value)} value(s), but {flag} is given {len(given)} time(s): give it "
                "once for each --value, in the same order, or not at all"
            )
    return problems
