"""Options that training, decoding and evaluation share: models, composition, devices.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed, and the conflicts between their fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from ivl_jax.config.annotations import Repeatable
from ivl_jax.config.checks import require, require_numbers
from ivl_jax.config.generation import strength_problem
from ivl_jax.config.strength import CONSTANT, StrengthPolicy, policy_scale_problem

DType = Literal["float32", "bfloat16", "float16"]
AttentionName = Literal["auto", "plain", "blocked", "splash", "cudnn"]
NGRAM_DRAFT = "ngram"
"""What `--draft` says where no model proposes tokens, but the text itself."""
LayoutName = Literal["full", "fsdp", "tensor", "replicated"]

LONGEST_DRAFT = 32
"""Tokens that a draft may be told to propose at a time."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; −1 on at most one axis means all remaining devices."""

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
            "mesh sizes must be ≥ 1, or −1 on one axis for all remaining devices; got "
            f"data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}",
        )


@dataclass(frozen=True)
class RuntimeConfig:
    """How programs are compiled; does not affect results."""

    compilation_cache: str = ""
    """Folder of JAX's persistent compilation cache; empty: among the user's caches
    (`XDG_CACHE_HOME`), unless `JAX_COMPILATION_CACHE_DIR` names another; `none`: no cache."""


@dataclass(frozen=True)
class ModelConfig:
    """How the networks of a run compute; affects results only by rounding."""

    attention: AttentionName = "auto"
    """How attention is computed: `plain` holds the scores of all pairs of tokens, `blocked` those
    of a few queries at a time, `splash` is a kernel for TPUs, `cudnn` one for GPUs; `auto` chooses
    by device, and `plain` for short rows."""


@dataclass(frozen=True)
class ComposedModelConfig:
    """The models and how they are composed: z = z_base + Σ α · M(z_value)."""

    base: str = ""
    """Hugging Face folder or hub id of the base model."""
    value: Repeatable[tuple[str, ...]] = ()
    """Value folder written by train.py, or `none` for the base alone; repeat the flag for several.
    A language model (Hugging Face folder or hub id) can serve as a value: `--value TUNED
    --value UNTUNED --strength 1 --strength -1` is proxy-tuning. For ivl-serve, NAME=FOLDER names
    it for requests."""
    strength: Repeatable[tuple[float, ...]] = ()
    """α in z = z_base + Σ α · z_value, one per value in the same order (default 1); 0 gives the
    base, a negative α steers away from the value."""
    strength_policy: str = CONSTANT
    """How much of α applies at each position: `constant`, all of it; `entropy`, α · H / (H + scale)
    with H the entropy of the base's prediction; `kl`, α · scale / (scale + D) with D the KL
    divergence of the composition at α from the base. α is then the most that applies."""
    policy_scale: float = 1.0
    """The H or D at which half of α applies, in nats; with `entropy` and `kl`."""
    map: Repeatable[tuple[str, ...]] = ()
    """Vocabulary map of a value whose tokenizer differs from the base's, built by `python -m
    ivl_jax.vocabulary build`; one per value in the same order, `none` for those without. For
    ivl-serve, NAME=FILE for the values that need one."""
    value_model: Repeatable[tuple[str, ...]] = ()
    """Folder or hub id of the model that a LoRA value belongs to, if it is not where the value
    folder says. Repeat the flag if the values belong to several; their fingerprints tell which."""
    connection: Repeatable[tuple[str, ...]] = ()
    """Your own connection scheme, `module:attribute`, that a value folder names; without this flag
    nothing is imported for a value folder. Repeat the flag for several."""
    draft: str = ""
    """A small model of the base's family that proposes tokens, which base and values then verify
    several at a time. Greedy text stays the same (except for near-ties), and samples are drawn from
    the same distribution. `ngram`: no model, but what followed the last tokens earlier in the text,
    for texts that repeat themselves or their prompt."""
    draft_length: int = 0
    """Tokens that the draft proposes at a time; 0: chosen while decoding."""
    dtype: DType = "float32"
    """Parameters and computation; logits are always composed in float32. float16 is for GPUs
    without bfloat16 (T4); networks whose activations exceed 65,504 fail in it and are named."""
    int8_base: bool = False
    """Round the base's kernels to int8: a quarter of their float32 memory, and faster on CPU."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1, tensor=-1))
    base_layout: LayoutName = "full"
    """How the base's parameters are sharded over the mesh; `full`: over fsdp and tensor."""
    value_layout: LayoutName = "full"
    """The same for the value networks; `replicated` keeps small ones whole on every device."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for alpha in self.strength:
            problem = strength_problem(alpha)
            require(problem is None, f"--strength {problem}")
        problem = policy_scale_problem(self.policy_scale)
        require(problem is None, f"--policy-scale {problem}")
        require_numbers(self)
        require(
            0 <= self.draft_length <= LONGEST_DRAFT,
            f"--draft-length must be in [0, {LONGEST_DRAFT}], got {self.draft_length}",
        )

    @property
    def values(self) -> tuple[str, ...]:
        """The value networks; none with `--value none`."""
        return tuple(path for path in self.value if path != "none")

    @property
    def policy(self) -> StrengthPolicy:
        """How much of the strengths applies at each position."""
        return StrengthPolicy(self.strength_policy, self.policy_scale)

    @property
    def draft_model(self) -> str:
        """The draft's folder or hub id; empty without one."""
        return "" if self.drafts_ngrams else self.draft

    @property
    def drafts_ngrams(self) -> bool:
        """Whether n-grams of the text propose tokens."""
        return self.draft == NGRAM_DRAFT


def model_problems(model: ComposedModelConfig) -> list[str]:
    """One phrase for each flag that is missing or conflicts with another.

    Args:
        model: the flags; without values, the base alone.
    """
    problems = []
    if not model.base:
        problems.append("--base is missing: name a Hugging Face folder or hub id")
    if model.draft_length and not model.draft:
        problems.append(f"--draft-length {model.draft_length} needs --draft")
    if model.policy_scale != 1 and model.policy.is_constant:
        problems.append(
            f"--policy-scale {model.policy_scale:g} needs --strength-policy entropy or kl"
        )
    if "none" in model.value:
        unused = [f"--value {path}" for path in model.values]
        unused += [] if model.policy.is_constant else [f"--strength-policy {model.policy.name}"]
        unused += [f"--strength {alpha}" for alpha in model.strength]
        unused += [f"--map {path}" for path in model.map if path != "none"]
        if unused:
            problems.append(
                f"--value none (the base alone) cannot be combined with {', '.join(unused)}: "
                "remove one"
            )
        return problems
    for flag, given in (("--strength", model.strength), ("--map", model.map)):
        if given and len(given) != len(model.value):
            problems.append(
                f"{len(model.value)} value(s), but {flag} is given {len(given)} time(s): give it "
                "once per --value, in the same order, or not at all"
            )
    return problems
