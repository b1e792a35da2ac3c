"""The value network of a run: where its parameters come from, and which of them are trained.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ivl_jax.config.checks import require, require_numbers
from ivl_jax.config.model import LayoutName
from ivl_jax.extensions import is_extension

LoraTargets = Literal["all-linear", "attention", "mlp"]
CONNECTIONS = ("residual", "cascade", "cascade_no_text", "hidden", "linear")


def is_connection(name: str) -> bool:
    """Whether a connection scheme may have this name: one of the package's or the user's own."""
    return name in CONNECTIONS or is_extension(name)


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: the only trained part of a value network whose own weights are frozen."""

    rank: int = 0
    """Width between the adapter's two matrices; 0: no adapter, all parameters are trained."""
    alpha: float = 16.0
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    targets: LoraTargets = "all-linear"
    """Which projections have an adapter: of attention, of the MLP, or both; never the head."""
    param_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How the frozen weights are stored; as `base.param_dtype`."""
    model: str = ""
    """The model that an adapter belongs to, if `value.path` is a LoRA value folder and the model is
    not where that folder says."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "value.lora.")
        require(self.rank >= 0, f"value.lora.rank must be ≥ 0, got {self.rank}")
        require(self.alpha > 0, f"value.lora.alpha must be > 0, got {self.alpha}")
        require(
            bool(self.rank) or not self.model,
            f'value.lora.model = "{self.model}" names the model of an adapter: set value.lora.rank',
        )


@dataclass(frozen=True)
class ValueConfig:
    """The value network: where its parameters come from and how it is connected to the base."""

    init: Literal["pretrained", "scratch", "base"] = "pretrained"
    """`pretrained`: the weights at `path`; `scratch`: random weights, the architecture of `path`;
    `base`: the base's own weights with an untied, zeroed head (so z = z_base at step 0)."""
    path: str = ""
    """Hugging Face folder or hub id; unused with `init = "base"`. With `lora`, also a LoRA value
    folder, whose adapter is trained further."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    connection: str = "residual"
    """How base and value are connected: `residual` (the paper's choice) reads only text, `cascade`
    and `cascade_no_text` read base predictions, `hidden` the base's final hidden states; `linear`
    is a matrix on base logits. Or `module:attribute` of a connection scheme of your own."""
    rank: int = 0
    """With `connection = "linear"`: width between its two matrices; 0: a single V × V matrix."""
    depths: int = 1
    """Last layers that its head reads, mixed token by token by a small router; 1: the last one
    alone. See `docs/recipes.md`."""
    depths_distillation: float = 0.1
    """With `depths` above 1: weight of the mean KL divergence of what each layer before the last
    predicts by itself from what all predict together, over counted tokens."""
    layout: LayoutName = "full"
    """Mesh axes that split its parameters and moments; may differ from the base's."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train only a low-rank adapter of it; see `docs/sizing.md`."""

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        require_numbers(self, "value.")
        require(
            is_connection(self.connection),
            f'value.connection = "{self.connection}": expected one of {", ".join(CONNECTIONS)}, or '
            "module:attribute of a connection scheme of your own",
        )
        require(self.depths >= 1, f"value.depths must be ≥ 1, got {self.depths}")
        require(
            0 <= self.depths_distillation < math.inf,
            f"value.depths_distillation must be ≥ 0, got {self.depths_distillation}",
        )
        require(
            self.depths == 1 or self.connection != "linear",
            f"value.depths = {self.depths} needs layers, and value.connection = "
            '"linear" has none: set value.depths = 1 or another connection',
        )
        zeroed = "starts with a zero head, which an adapter never changes"
        require(
            not self.lora.rank or self.init == "pretrained",
            f"value.lora.rank = {self.lora.rank} adapts pre-trained weights, but value.init = "
            f'"{self.init}" {zeroed if self.init == "base" else "has none"}: set '
            'value.init = "pretrained" and value.path, or value.lora.rank = 0',
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
            f'value.path = "{self.path}" cannot be combined with value.init = "base": remove one',
        )
