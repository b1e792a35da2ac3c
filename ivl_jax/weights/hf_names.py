"""The one table between parameter paths and Hugging Face tensor names.

In: a parameter path, or a tensor name of a file. Out: the name and orientation of the tensor that
holds the parameter; the name a tensor has in a plain causal language model, or the reason why it is
no parameter.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import traverse_util

from ivl_jax.model.architecture import ArchConfig

ParamPath = tuple[str | int, ...]
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


# Last key of a parameter path -> last part of the tensor's name, whether it lies transposed.
_LEAVES = {
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
    "kernel": ("weight", True),
}

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


def hf_tensor(path: Sequence[str | int]) -> HfTensor:
    """Name the tensor that holds a parameter.

    Args:
        path: keys of the parameter: `("layers", 0, "mlp", "up_proj", "kernel")`.

    Returns:
        The tensor: `HfTensor("model.layers.0.mlp.up_proj.weight", transposed=True)`.

    Raises:
        KeyError: no parameter of a decoder ends like this.
    """
    *modules, leaf = path
    suffix, transposed = _LEAVES[str(leaf)]
    root = () if modules[0] == "lm_head" else ("model",)
    return HfTensor(".".join(map(str, (*root, *modules, suffix))), transposed)


def flat_paths(tree: Mapping[Any, Any]) -> dict[ParamPath, Any]:
    """The leaves of a tree of parameters by their paths."""
    return traverse_util.flatten_dict(dict(tree))  # type: ignore[return-value]


def shape_in_file(
    tensor: HfTensor, param_shape: tuple[int, ...], arch: ArchConfig
) -> tuple[int, ...]:
    """The shape that the tensor of a parameter has in a file: no vocabulary padding there.

    Args:
        tensor: of `hf_tensor`.
        param_shape: of the parameter as it is trained.
        arch: the architecture.

    Returns:
        Its shape.
    """
    shape = param_shape[::-1] if tensor.transposed else param_shape
    return (arch.vocab_size, *shape[1:]) if tensor.name in (EMBEDDING, LM_HEAD) else shape


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
