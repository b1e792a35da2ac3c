"""The peer in writing answers: `generate` of transformers, with a value network's logits added.

In: two models of transformers with one vocabulary, prompts, how many tokens each answer takes. Out:
answers. A logits processor runs the value network, which has its own cache, and adds its
logits to the base's. Prompts of unequal length are padded on the left, as `generate` asks; a row
that has its tokens is decoded on until the last one of its batch has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.torch_peers import CACHE_ARGUMENT

PAD = 0
_GREEDY: dict[str, Any] = {"do_sample": False}
_SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class AddedLogits(LogitsProcessor):
    """Adds the value network's logits of the next token."""

    def __init__(self, value: LlamaForCausalLM, mask: torch.Tensor) -> None:
        self._value, self._mask = value, mask
        self._cache = DynamicCache()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Add them to scores [B V] of the token after `input_ids` [B T]."""
        unread = input_ids[:, self._cache.get_seq_length() :]
        more = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.nn.functional.pad(self._mask, (0, more), value=1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -unread.shape[1] :]
        kwargs: dict[str, Any] = {CACHE_ARGUMENT: self._cache}
        out = self._value(
            unread,
            attention_mask=mask,
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **kwargs,
        )
        return scores + out.logits[:, -1]


class _Lengths(StoppingCriteria):
    """Says of each row whether it has its own number of tokens."""

    def __init__(self, ends: torch.Tensor) -> None:
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self._ends


@torch.inference_mode()
def write_answers(
    base: Any,
    value: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    greedy: bool,
) -> torch.Tensor:
    """Write one batch of answers.

    Args:
        base: the base, a model of transformers.
        value: the value network.
        prompts: token ids.
        lengths: tokens of each answer.
        greedy: take the likeliest tokens; False: sample at temperature 1.

    Returns:
        [B T] prompts, padded on the left, and answers; what follows a row's own length is to be
        ignored.
    """
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ends = longest + torch.tensor(lengths)
    return base.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(lengths),
        **_GREEDY if greedy else _SAMPLED,
        pad_token_id=PAD,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([AddedLogits(value, mask)]),
        stopping_criteria=StoppingCriteriaList([_Lengths(ends)]),
    )
