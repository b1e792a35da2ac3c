"""Names of tensors in Hugging Face files: of each parameter, and of what other wrappers call it.

In: an architecture, or a tensor name of a file. Out: name, orientation and shape of the tensors
that hold its parameters; the name a tensor has in a plain causal language model, or the reason why
it is not a parameter.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import traverse_util

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import abstract_params, parameter_declarations
from ivl_jax.model.parameter import Declaration, ParamPath

PARAM_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Of parameters, in memory and in files that we write."""


class HfTensor(NamedTuple):
    """The tensor of a Hugging Face file that holds one parameter.

    `torch.nn.Linear` stores (out, in) and we store (in, out), which a matrix × vector product on
    CPU reads 15 times faster; everything else is stored alike. Gemma's norms are *not* folded into
    1 + scale.
    """

    name: str  # as `LlamaForCausalLM` and its relatives call it
    transposed: bool
    shape: tuple[int, ...]  # of what holds the parameter; without vocabulary padding
    start: int  # its first row, which is not 0 where the tensor holds several parameters


LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Prefix in a file -> prefix in a plain causal model, the first match counts. Gemma 3 with its
# vision part is written as `language_model.model.` (what the hub has, and what transformers 5 still
# writes) or `model.language_model.`; a decoder saved without its head has no prefix at all.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)

# Gemma 3's image encoder: not part of the text decoder, left out with a notice.
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")

# Tables of rotary frequencies that older versions of transformers stored; today's ignore them as
# well and compute them from config.json.
_DERIVED = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.inv_freq$")


def hf_tensors(arch: ArchConfig) -> dict[ParamPath, HfTensor]:
    """Name the tensor that holds each parameter, as the parameter's module declares it.

    Args:
        arch: the architecture.

    Returns:
        Path of a parameter as it is trained, layers unstacked → its tensor, for example
        `("layers", 0, "mlp", "up_proj", "kernel")` →
        `HfTensor("model.layers.0.mlp.up_proj.weight", True, (5632, 2048), 0)`.
    """
    shapes = flat_paths(abstract_params(arch))
    return {
        path: _tensor(path, declared, shapes[path].shape)
        for path, declared in parameter_declarations(arch).items()
        if declared.hf_suffix is not None
    }


def _tensor(path: ParamPath, declared: Declaration, shape: tuple[int, ...]) -> HfTensor:
    *modules, own = path[:-1]
    root = () if own == "lm_head" else ("model",)
    fused = declared.fused_in
    module = own if fused is None else fused.module
    return HfTensor(
        name=".".join(map(str, (*root, *modules, module, declared.hf_suffix))),
        transposed=declared.transposed,
        shape=shape[::-1] if declared.transposed else shape,
        start=0 if fused is None else fused.start,
    )


def flat_paths(tree: Mapping[Any, Any]) -> dict[ParamPath, Any]:
    """The leaves of a tree of parameters by their paths."""
    return traverse_util.flatten_dict(dict(tree))  # type: ignore[return-value]


def file_shapes(arch: ArchConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a file of this architecture holds."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor in sorted(hf_tensors(arch).values(), key=lambda tensor: tensor.start):
        rows, *columns = tensor.shape
        found[tensor.name] = (tensor.start + rows, *columns)
    return found


def causal_name(name: str) -> str:
    """Give the name that a tensor has in a plain causal language model.

    Args:
        name: as the file has it: `language_model.model.norm.weight`.

    Returns:
        `model.norm.weight`; names that follow no known pattern stay as they are.
    """
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def is_derived(name: str) -> bool:
    """Say whether a causal name is a stored rotary table, which config.json determines."""
    return _DERIVED.match(name) is not None


def is_vision(name: str) -> bool:
    """Say whether a name belongs to Gemma 3's image encoder, beside its text decoder."""
    return _VISION.match(name) is not None
