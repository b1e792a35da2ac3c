"""Names of tensors in Hugging Face files, also under the prefixes that other wrappers use.

In: an architecture, or a tensor name from a file. Out: name, orientation and shape of the tensors
of its parameters; a tensor's name in a plain causal language model, or whether it is not a
parameter.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import traverse_util

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import abstract_params, parameter_declarations
from ivl_jax.model.parameter import Declaration, ParamPath

PARAM_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Dtypes of parameters in files that we write."""
LOADED_DTYPES = (*PARAM_DTYPES, jnp.dtype(jnp.float16))
"""Dtypes of parameters in memory."""


class HfTensor(NamedTuple):
    """The tensor of a Hugging Face file that stores one parameter.

    `torch.nn.Linear` stores (out, in); we store (in, out), which a matrix × vector product on CPU
    reads 15 times faster. Everything else has the same orientation. Gemma's norms are *not* folded
    into 1 + scale.
    """

    name: str  # as in `LlamaForCausalLM` and similar classes
    transposed: bool
    shape: tuple[int, ...]  # of the parameter's rows in the file, without vocabulary padding
    start: int  # its first row; not 0 in a tensor that stores several parameters


LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Prefix in a file -> prefix in a plain causal model; the first match counts. Multimodal Gemma 3 is
# written as `language_model.model.` (on the hub, and by transformers 5) or `model.language_model.`;
# a decoder saved without its head has no prefix.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)

# Gemma 3's image encoder: not part of the text decoder, ignored with a warning.
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")

_LAYER = re.compile(r"^model\.layers\.(\d{1,9})\.")

# Tables of rotary frequencies that older versions of transformers stored; current ones also ignore
# them and compute them from config.json.
_DERIVED = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.inv_freq$")


def hf_tensors(arch: ArchConfig) -> dict[ParamPath, HfTensor]:
    """The tensor that stores each parameter, as declared by the parameter's module.

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
    """The leaves of a parameter tree by path."""
    return traverse_util.flatten_dict(dict(tree))  # type: ignore[return-value]


def file_shapes(arch: ArchConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the files of this architecture."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor in sorted(hf_tensors(arch).values(), key=lambda tensor: tensor.start):
        rows, *columns = tensor.shape
        found[tensor.name] = (tensor.start + rows, *columns)
    return found


def causal_name(name: str) -> str:
    """The name that a tensor has in a plain causal language model.

    Args:
        name: as in the file, for example `language_model.model.norm.weight`.

    Returns:
        For example `model.norm.weight`; names without a known prefix are unchanged.
    """
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def stored_layers(names: Iterable[str]) -> int:
    """The number of layers whose tensors are among these causal names; 0 for other models."""
    layers = (_LAYER.match(name) for name in names)
    return max((int(layer[1]) + 1 for layer in layers if layer), default=0)


def is_derived(name: str) -> bool:
    """Whether a causal name is a stored rotary table, which config.json determines."""
    return _DERIVED.match(name) is not None


def is_vision(name: str) -> bool:
    """Whether a name belongs to Gemma 3's image encoder."""
    return _VISION.match(name) is not None
