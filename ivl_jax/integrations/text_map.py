"""A value network with another vocabulary, for PyTorch: the text in its tokens, its logits mapped.

In: a vocabulary map, the tokenizers of base and value network. Out: a `TextMap`, which gives the
text so far in the value network's tokens, and its logits in the base's columns.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ivl_jax.text_codec import TextCodec
from ivl_jax.tokenizer import describe_tokenizer
from ivl_jax.vocabulary.mapping import check_vocabulary_map, load_vocabulary_map
from ivl_jax.vocabulary.retokenize import Retokenizer, forward_pairs
from ivl_jax.vocabulary.special_tokens import base_stop_ids


class TextMap:
    """How a value network with another vocabulary reads a text, and speaks to the base.

    Args:
        path: a file written by `python -m ivl_jax.vocabulary build`.
        base: the base's tokenizer.
        value: the value network's.

    Attributes:
        retokenizer: From the base's tokens to the value network's.

    Raises:
        VocabularyMapError: the map cannot be read, or was built for other tokenizers.
    """

    def __init__(
        self,
        path: str | Path,
        base: PreTrainedTokenizerBase,
        value: PreTrainedTokenizerBase,
    ) -> None:
        vocabulary_map, metadata = load_vocabulary_map(path)
        source, target = (TextCodec(each, describe_tokenizer(each)) for each in (base, value))
        check_vocabulary_map(
            metadata,
            path=path,
            base_name=base.name_or_path,
            base_fingerprint=source.info.fingerprint,
            value_name=value.name_or_path,
            value_fingerprint=target.info.fingerprint,
        )
        self.retokenizer = Retokenizer(source, target, forward_pairs(metadata.special_pairs))
        self._special_pairs, self._centred = metadata.special_pairs, metadata.centred
        arrays = (np.array(array) for array in vocabulary_map)
        # One entry per base token, or several: [Vb K].
        self._index, self._weight = (
            torch.from_numpy(array.reshape(len(array), -1)) for array in arrays
        )
        self._used = torch.unique(self._index[self._weight != 0])

    def to_base(self, value_logits: torch.Tensor) -> torch.Tensor:
        """Map logits to the base's vocabulary.

        Args:
            value_logits: [B Vv] in float32.

        Returns:
            [B Vb]: Σ weight · z_value over a base token's entries, 0 where it is unmapped.
        """
        index, weight, used = (
            array.to(value_logits.device) for array in (self._index, self._weight, self._used)
        )
        if self._centred:
            value_logits = value_logits - value_logits[:, used].mean(dim=1, keepdim=True)
        return (value_logits[:, index] * weight).sum(dim=-1)

    def stop_ids(self, value_stop_ids: int | Iterable[int]) -> list[int]:
        """The base's ids for ends that the value network learned.

        Args:
            value_stop_ids: what ends its texts, as in its `generation_config.eos_token_id`.

        Returns:
            Base ids, for the `eos_token_id` of `generate`.
        """
        own = {value_stop_ids} if isinstance(value_stop_ids, int) else set(value_stop_ids)
        return list(base_stop_ids(self._special_pairs, own))
