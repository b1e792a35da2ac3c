"""The peers in decoding: PyTorch with transformers, with the same weights as ours.

In: architectures and our parameters. Out: `TorchPeer`s, which read prompts and generate greedily,
with transformers' defaults: scaled-dot-product attention and a growing cache.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from flax import traverse_util
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.setting import thread_count
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params
from ivl_jax.weights.hf_names import hf_tensors

# transformers 5.24 renamed the argument; the old name gives a warning per call.
_FORWARD_ARGUMENTS = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE_ARGUMENT = "cache" if "cache" in _FORWARD_ARGUMENTS else "past_key_values"


class Term(NamedTuple):
    """One summand of the composed logits."""

    model: LlamaForCausalLM
    strength: float


class _State(NamedTuple):
    """A batch whose prompts have been read."""

    tokens: torch.Tensor
    """[B T] prompt and generated tokens."""
    caches: tuple[DynamicCache, ...]
    """Each model's cache of all tokens but the last; empty for a peer without caches."""


@dataclass(frozen=True)
class TorchPeer:
    """Several models whose weighted logits are added, as the method prescribes.

    Attributes:
        terms: The models.
        cached: False: every step reads the whole text, as in the authors' released code.
    """

    terms: tuple[Term, ...]
    cached: bool = True

    @torch.inference_mode()
    def prefill(self, prompts: np.ndarray) -> _State:
        """Read prompts [B T] and generate the first token."""
        tokens = torch.from_numpy(prompts).long()
        caches = tuple(DynamicCache() for _ in self.terms) if self.cached else ()
        return _State(self._append(tokens, tokens, caches), caches)

    @torch.inference_mode()
    def decode(self, state: _State, new_tokens: int) -> np.ndarray:
        """Generate this many more tokens; returns all tokens [B T]."""
        tokens = state.tokens
        for _ in range(new_tokens):
            unread = tokens[:, -1:] if self.cached else tokens
            tokens = self._append(tokens, unread, state.caches)
        return tokens.numpy().astype(np.int32)

    def _append(
        self, tokens: torch.Tensor, unread: torch.Tensor, caches: Sequence[DynamicCache]
    ) -> torch.Tensor:
        total = torch.zeros(())
        for index, (model, strength) in enumerate(self.terms):
            cache = caches[index] if caches else None
            kwargs: dict[str, Any] = {CACHE_ARGUMENT: cache}
            out = model(unread, use_cache=cache is not None, logits_to_keep=1, **kwargs)
            total = total + strength * out.logits[:, -1].float()
        return torch.cat([tokens, total.argmax(-1, keepdim=True)], dim=1)


def llama(arch: ArchConfig, params: Params, *, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a transformers model with our parameters.

    Args:
        arch: a Llama's shape.
        params: as trained, layers unstacked.
        dtype: of the weights and of the computation.

    Returns:
        The model, in inference mode.
    """
    torch.set_num_threads(thread_count())
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**arch.to_hf()))
    weights, tensors = {}, hf_tensors(arch)
    leaves: dict[Any, Any] = traverse_util.flatten_dict(dict(params))
    for path, leaf in leaves.items():
        tensor = tensors[path]
        array = torch.from_numpy(np.array(leaf))
        weights[tensor.name] = (array.T if tensor.transposed else array).to(dtype).contiguous()
    model.load_state_dict(weights, assign=True, strict=True)
    # The table of rotary frequencies is not a weight, and the meta device left it empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()
