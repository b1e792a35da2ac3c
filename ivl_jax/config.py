"""Every configuration dataclass, with its defaults, its help texts and its checks.

In: values from a TOML file (config_files.py) or the command line. Out: frozen dataclasses whose
cross-field checks have passed. Imports no JAX, so that `--help` stays fast.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ivl_jax.config_parts import (
    CONNECTIONS,
    BaseConfig,
    ConfigError,
    DataConfig,
    DemonstrationFormat,
    DType,
    LayoutName,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    PenaltyKind,
    PenaltyPositions,
    StepConfig,
    ValueConfig,
    is_connection,
    require,
)

__all__ = [
    "CONNECTIONS",
    "BaseConfig",
    "ConfigError",
    "DType",
    "DataConfig",
    "DemonstrationFormat",
    "InferConfig",
    "LayoutName",
    "LoggingConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PenaltyConfig",
    "PenaltyKind",
    "PenaltyPositions",
    "StepConfig",
    "TrainConfig",
    "ValueConfig",
    "check_infer_config",
    "check_train_config",
    "is_connection",
]


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: str = ""
    """Folder of the run: config, versions, metrics, checkpoints and the final value folder."""
    objective: str = "sft"
    """What is minimised: sft, or module:attribute of an objective of your own."""
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
    profile: str = ""
    """Write a trace of the third to seventh step to this folder, for TensorBoard or xprof."""
    base: BaseConfig = field(default_factory=BaseConfig)
    bases: tuple[BaseConfig, ...] = ()
    """Train against several bases in turns, one a batch, instead of `base` (TOML: `[[bases]]`)."""
    value: ValueConfig = field(default_factory=ValueConfig)
    data: DataConfig = field(default_factory=DataConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: StepConfig = field(default_factory=StepConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def all_bases(self) -> tuple[BaseConfig, ...]:
        """`bases`, or the one `base`."""
        return self.bases or (self.base,)


def check_train_config(config: TrainConfig) -> None:
    """Check what a run cannot start without.

    Raises:
        ConfigError: a required field is empty; lists all of them.
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
    if problems:
        raise ConfigError(
            "this run cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )


def _base_problems(config: TrainConfig) -> list[str]:
    problems = []
    if config.bases and config.base.path:
        problems.append(
            f'base.path = "{config.base.path}" has no use beside [[bases]]: make it one of them'
        )
    names = [f"bases[{index}].path" for index in range(len(config.bases))] or ["base.path"]
    paths = [base.path for base in config.all_bases]
    problems += [
        f"{name} is empty: name a Hugging Face folder or hub id"
        for name, path in zip(names, paths, strict=True)
        if not path
    ]
    if repeated := {path for path in paths if path and paths.count(path) > 1}:
        problems.append(f"[[bases]] names {', '.join(sorted(repeated))} twice: use its weight")
    if config.distributed and any(base.cache_states for base in config.all_bases):
        problems.append(
            "cache_states = true needs distributed = false: which dialogues a process reads "
            "changes with the shuffle, and hosts may have disks of their own"
        )
    if config.method == "sft":
        if config.bases:
            problems.append('method = "sft" fine-tunes one model: name it in [base], not [[bases]]')
        if config.base.cache_states:
            problems.append(
                'base.cache_states has no use with method = "sft": the states change in every step'
            )
        if config.base.param_dtype != "float32":
            problems.append(
                f'base.param_dtype = "{config.base.param_dtype}" has no use with method = "sft": '
                "what is trained is held in float32; see step.compute_dtype"
            )
    return problems


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
    draft: str = ""
    """A small model of the base's family that proposes tokens, which base and values then check
    several at a time. Greedy text stays the same (but for near-ties), and samples are drawn from
    the same distribution."""
    draft_length: int = 0
    """Tokens that the draft proposes at a time; 0: as many as pay."""
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
    """Prompts decoded together, with --input; where one ends, the next takes its place."""
    compilation_cache: str = ""
    """Folder of JAX's persistent compilation cache; empty: none."""
    profile: str = ""
    """Write a trace of the third to seventh step, of up to 16 tokens a row each (4 of a single
    prompt), to this folder, for TensorBoard or xprof."""
    dtype: DType = "float32"
    """Parameters and computation; logits are always composed in float32."""
    int8_base: bool = False
    """Round the base's kernels to int8: a quarter of their float32 memory, and faster on CPU."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1, tensor=-1))
    base_layout: LayoutName = "full"
    """How the base's parameters are split on the mesh; `full`: over fsdp and tensor."""
    value_layout: LayoutName = "full"
    """The same for the value networks; `replicated` keeps small ones whole on every device."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.max_new_tokens >= 1, f"--max-new-tokens must be ≥ 1, got {self.max_new_tokens}"
        )
        require(
            0 <= self.temperature < math.inf,
            f"--temperature must be ≥ 0 and finite, got {self.temperature}",
        )
        require(
            all(map(math.isfinite, self.strength)),
            f"--strength must be finite, got {', '.join(map(str, self.strength))}",
        )
        require(0 <= self.seed < 2**32, f"--seed must be in [0, 2³²), got {self.seed}")
        require(self.top_k >= 0, f"--top-k must be ≥ 0, got {self.top_k}")
        require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], got {self.top_p}")
        require(0 <= self.min_p < 1, f"--min-p must be in [0, 1), got {self.min_p}")
        require(
            0 <= self.draft_length <= 32,
            f"--draft-length must be in [0, 32], got {self.draft_length}",
        )
        require(self.batch_size >= 1, f"--batch-size must be ≥ 1, got {self.batch_size}")


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
    if config.draft_length and not config.draft:
        problems.append(f"--draft-length {config.draft_length} has no use without --draft")
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
