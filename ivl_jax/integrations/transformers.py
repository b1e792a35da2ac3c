"""Value networks in PyTorch: z = z_base + Σ α · M(z_value) inside transformers' `generate`.

In: value folders, hub ids, or folders written by `export-hf`; strengths. Out: a `LogitsProcessor`.
It sees only the base's logits at the last position, so it works for residual value networks alone;
`infer.py` decodes the others.

    value, tokenizer = load_torch_value("runs/mine/value")
    processor = ValueLogits(
        [value], [0.8], base_tokenizer=of_base, value_tokenizers=[tokenizer])
    base.generate(**inputs, logits_processor=[processor])
"""

import contextlib
import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.config import strength_problem
from ivl_jax.paths import MissingExtraError
from ivl_jax.tokenizer import describe_tokenizer
from ivl_jax.tokenizer_agreement import check_compatible, known_ids

try:
    import torch
except ImportError as error:
    raise MissingExtraError(
        "ivl_jax.integrations.transformers needs PyTorch, the extra `torch`: "
        "pip install 'ivl_jax[torch]'"
    ) from error
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ivl_jax.integrations.text_map import TextMap
from ivl_jax.vocabulary.retokenize import RetokenizedText

__all__ = ["TextMap", "ValueLogits", "load_torch_value"]


class ValueLogits(LogitsProcessor):
    """Adds Σ α · M(z_value) to the base's logits, in float32: greedy, sampled and assisted.

    Each value network keeps a cache and reads each token once. A processor can be used again.

    Args:
        values: causal language models whose logits are z_value, on any device.
        strengths: α, one per value; empty: 1 for each.
        text_maps: for each value its `TextMap`, or None where it shares the base's vocabulary;
            empty: all do. A prompt is read as text, not through the value's chat template.
        base_tokenizer: the base's; needed where a value network has no map.
        value_tokenizers: one per value; they are compared with the base's. A token that a value
            network does not know gets its logit 0, and is read as its unknown token.
        attention_mask: [B T], the prompts' own, 0 for padding on the left; None: no padding. With
            several sequences per prompt it stays as it is.

    Raises:
        TokenizerMismatchError: a value network without a map has another vocabulary.
        ValueError: not one strength, map or tokenizer per value, a strength that is not finite, no
            tokenizers to compare, or padding that is not on the left.
    """

    def __init__(
        self,
        values: Sequence[Any],
        strengths: Sequence[float] = (),
        *,
        text_maps: Sequence[TextMap | None] = (),
        base_tokenizer: PreTrainedTokenizerBase | None = None,
        value_tokenizers: Sequence[PreTrainedTokenizerBase] = (),
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        strengths = tuple(strengths) or (1.0,) * len(values)
        text_maps = tuple(text_maps) or (None,) * len(values)
        for name, given in (("strengths", strengths), ("text_maps", text_maps)):
            if len(given) != len(values):
                raise ValueError(
                    f"{name}: expected one per value network, {len(values)}, got {len(given)}"
                )
        for strength in strengths:
            if problem := strength_problem(strength):
                raise ValueError(f"strengths {problem}")
        if attention_mask is not None and (attention_mask.diff(dim=1) < 0).any():
            raise ValueError(
                "attention_mask: expected padding on the left only, as `generate` needs it; set "
                'tokenizer.padding_side = "left"'
            )
        shared = _shared_tokens(values, text_maps, base_tokenizer, value_tokenizers)
        self._terms = [
            (strength, shared[place] if text_map is None else _OwnTokens(values[place], text_map))
            for place, (strength, text_map) in enumerate(zip(strengths, text_maps, strict=True))
            if strength != 0
        ]
        self._prompt_mask = attention_mask
        self._read: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Compose the logits of the next token.

        Args:
            input_ids: [B T], the text so far.
            scores: [B V], the base's logits.

        Returns:
            [B V] in float32.

        Raises:
            ValueError: the scores are log-probabilities (beam search), or the text does not belong
                to the attention mask.
        """
        composed = scores.float().clone()
        known = self._known_columns(input_ids)
        if known == 0:
            _check_logits(composed)
        mask = self._mask(input_ids)
        for strength, reader in self._terms:
            logits = reader.read(input_ids, mask, known=known).to(composed.device)
            width = min(composed.shape[-1], logits.shape[-1])  # beyond: padding of either
            composed[:, :width] += strength * logits[:, :width]
        self._read = input_ids.clone()
        return composed

    def _known_columns(self, input_ids: torch.Tensor) -> int:
        """How many columns of this text have been read; all but the last one at most."""
        read = self._read
        if read is None or read.shape[0] != input_ids.shape[0]:
            return 0
        width = min(read.shape[1], input_ids.shape[1] - 1)
        unlike = (read[:, :width] != input_ids[:, :width]).any(dim=0).nonzero()
        return int(unlike[0]) if len(unlike) else width

    def _mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B T] 1 for text, 0 for padding."""
        mask, given = torch.ones_like(input_ids), self._prompt_mask
        if given is None:
            return mask
        rows, width = input_ids.shape
        if rows % given.shape[0] or width < given.shape[1]:
            raise ValueError(
                f"attention_mask has shape {tuple(given.shape)}, but the text is [{rows} {width}]: "
                "make a ValueLogits with the mask of each batch of prompts"
            )
        repeats = rows // given.shape[0]  # sequences per prompt
        mask[:, : given.shape[1]] = given.repeat_interleave(repeats, dim=0)
        return mask


def _check_logits(scores: torch.Tensor) -> None:
    if torch.logsumexp(scores, dim=-1).abs().max() < 1e-3:
        raise ValueError(
            "expected the base's logits, got log-probabilities: beam search normalises the base "
            "before its processors, so their sum would not be that of the logits; set num_beams=1"
        )


def _shared_tokens(
    values: Sequence[Any],
    text_maps: Sequence[TextMap | None],
    base: PreTrainedTokenizerBase | None,
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> "dict[int, _SharedTokens]":
    """The value networks without a map, by place, their vocabularies compared with the base's."""
    places = [place for place, text_map in enumerate(text_maps) if text_map is None]
    if not places:
        return {}
    if base is None or len(tokenizers) != len(values):
        raise ValueError(
            "base_tokenizer and value_tokenizers: expected the base's tokenizer and one per value "
            f"network, {len(values)}, got {'none' if base is None else 'one'} and "
            f"{len(tokenizers)}; they show whether logits can be added id by id"
        )
    of_base, shared = describe_tokenizer(base), {}
    for place in places:
        of_value = describe_tokenizer(tokenizers[place])
        unknown = check_compatible(
            of_base,
            of_value,
            base_name=base.name_or_path or "base",
            value_name=tokenizers[place].name_or_path or f"value {place}",
        )
        known = torch.zeros(of_base.vocab_size, dtype=torch.bool)
        known[sorted(known_ids(of_base) - set(unknown.ids))] = True
        shared[place] = _SharedTokens(values[place], known, of_value.replacement_id)
    return shared


class _CachedModel:
    """A value network, and the tokens of some rows that its cache holds."""

    def __init__(self, model: Any) -> None:
        self.model = model
        named = inspect.signature(model.forward).parameters
        # transformers 5.24 renamed `past_key_values` to `cache`; both names are in use.
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in named else {}

    def last_logits(
        self, cache: DynamicCache, tokens: torch.Tensor, start: int, **more: torch.Tensor
    ) -> torch.Tensor:
        """[B V] in float32: discard the cache from `start`, and read these tokens there."""
        extra = cache.get_seq_length() - start
        if extra > 0:
            cache.crop(-extra)
        device = self.model.device
        given = {name: array.to(device) for name, array in more.items()}
        output = self.model(
            tokens.to(device), **{self._cache_name: cache}, **given, **self._last_only
        )
        return output.logits[:, -1].float()


class _SharedTokens:
    """Reads the text of all rows in the base's tokens."""

    def __init__(self, model: Any, known: torch.Tensor, replacement_id: int) -> None:
        self._cached, self._cache = _CachedModel(model), DynamicCache()
        self._known, self._replacement_id = known, replacement_id

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, *, known: int) -> torch.Tensor:
        """[B V] logits after a text whose first columns are known."""
        if known == 0:
            self._cache = DynamicCache()
        padded: dict[str, torch.Tensor] = {}
        if not mask.all():
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            padded = {"attention_mask": mask, "position_ids": positions[:, known:]}
        shared, tokens = self._known.to(input_ids.device), input_ids[:, known:]
        readable = shared[tokens.clamp(max=len(shared) - 1)] & (tokens < len(shared))
        tokens = tokens.masked_fill(~readable, self._replacement_id)
        logits = self._cached.last_logits(self._cache, tokens, known, **padded)
        logits = logits[:, : len(shared)]  # without padding columns
        return logits.where(shared[: logits.shape[-1]].to(logits.device), 0.0)


class _OwnTokens:
    """Reads each row's text in the value network's own tokens, of which rows have unlike many."""

    def __init__(self, model: Any, text_map: TextMap) -> None:
        self._cached, self._map = _CachedModel(model), text_map
        self._rows: list[tuple[RetokenizedText, DynamicCache]] = []
        self._columns = 0

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, *, known: int) -> torch.Tensor:
        """[B Vb] mapped logits after a text whose first columns are known."""
        begins = known < self._columns or known == 0
        logits = []
        for row, ids in enumerate(input_ids.tolist()):
            if begins:
                padding = int((mask[row] == 0).sum())
                text, start = self._map.retokenizer.begin(ids[padding:]), 0
                self._rows[row:] = [(text, DynamicCache())]
            else:
                text = self._rows[row][0]
                start = text.push(ids[known:])
            start = min(start, len(text.tokens) - 1)
            unread = torch.tensor([text.tokens[start:]])
            logits.append(self._cached.last_logits(self._rows[row][1], unread, start))
        self._columns = input_ids.shape[1]
        return self._map.to_base(torch.cat(logits))


def load_torch_value(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a residual value network as a PyTorch model.

    Args:
        path: a value folder, its hub id, or a folder written by `export-hf`.

    Returns:
        The model in float32, and its tokenizer with the chat template it was trained with.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the network reads more than text, or its head several depths, so PyTorch cannot
            decode with it.
    """
    with _model_folder(path) as folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _model_folder(path: str | Path) -> Iterator[Path]:
    """The Hugging Face folder of a value network; a temporary one of a value folder."""
    if (Path(path) / "config.json").exists():
        yield Path(path)
        return
    from ivl_jax.checkpoint.hub import find_value_folder
    from ivl_jax.checkpoint.hugging_face import check_exportable, export_hugging_face
    from ivl_jax.checkpoint.value_folder import load_value
    from ivl_jax.data.templates import standalone_template

    folder = find_value_folder(path)
    with tempfile.TemporaryDirectory(prefix="ivl_jax-value-") as temporary:
        out = Path(temporary) / "value"
        check_exportable(folder, out, overwrite=False)
        value = load_value(folder)
        template = standalone_template(value.tokenizer, value.chat_template)
        export_hugging_face(value, out, dtype="float32", chat_template=template)
        yield out
