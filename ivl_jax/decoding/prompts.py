"""How prompts become tokens for a base under value networks; no weight is needed for it.

In: the models of a composition, before their weights. Out: `EncodedPrompt`s that have passed every
check.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.composed.sources import ModelSource
from ivl_jax.composed.strength_policies import check_policy
from ivl_jax.config import GenerationKeywords, options_with
from ivl_jax.data.chat import ChatFormat, make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.decoding.given_prompts import PlainPrompt, Prompt, plain_prompt, plain_prompts
from ivl_jax.decoding.own_vocabulary import OwnVocabulary, base_chat_format, make_own_vocabulary
from ivl_jax.decoding.requests import EncodedPrompt, GenerationOptions, PromptTooLongError
from ivl_jax.text_codec import TextCodec

logger = logging.getLogger(__name__)

Options = GenerationOptions | Mapping[str, Any] | Sequence[GenerationOptions | Mapping[str, Any]]
"""One for all prompts, or one per prompt; a mapping holds fields of `GenerationOptions`."""

GREEDY = GenerationOptions()
_MOST_PROBLEMS_NAMED = 20


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Reads prompts for a base under value networks, and checks them.

    Attributes:
        base: The base.
        values: The value networks.
        context: Tokens a row may hold: the smallest context of all networks.
        context_of: The name of the network with that context.
        own_vocabularies: How each value network with its own vocabulary reads text; None for
            those that share the base's.
    """

    base: ModelSource
    values: tuple[ModelSource, ...]
    context: int
    context_of: str
    own_vocabularies: tuple[OwnVocabulary | None, ...]

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How dialogues become tokens: the first value network's format, else the base's own.

        A value network with its own vocabulary has its template read in the base's tokens.
        """
        if self.own_vocabularies and (own := self.own_vocabularies[0]) is not None:
            return base_chat_format(self.base.tokenizer, own)
        first = self.values[0] if self.values else self.base
        return make_chat_format(first.tokenizer, template=first.chat_template)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Base ids that end a row: those of the base and, as the base says them, of every value."""
        ends = list(self.base.stop_ids)
        for value, own in zip(self.values, self.own_vocabularies, strict=True):
            ends += value.stop_ids if own is None else own.stop_ids
        return tuple(dict.fromkeys(ends))

    def encode(self, prompt: Prompt) -> list[int]:
        """As `ComposedModel.encode`."""
        token_ids, begun = self._token_ids(plain_prompt(prompt))
        self._warn_begun(["the prompt"] if begun else [])
        return token_ids

    def prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: Options = GREEDY,
        *,
        names: Sequence[str] = (),
        keywords: GenerationKeywords | None = None,
    ) -> list[EncodedPrompt]:
        """As `ComposedModel.prepare`."""
        plain = plain_prompts(prompts)
        each = _options_of(options, keywords or {}, number=len(plain))
        encoded, problems, begun = [], [], []
        too_long = False
        for row, (prompt, option) in enumerate(zip(plain, each, strict=True)):
            name = names[row] if names else f"prompt {row}"
            try:
                token_ids, begins = self._token_ids(prompt)
                # Before it is read again for value networks with their own vocabulary.
                self._check_length(token_ids)
                encoded.append(self._encode(prompt, token_ids, option, row))
                self._check(encoded[-1])
            except ValueError as error:
                too_long |= isinstance(error, PromptTooLongError)
                problems.append(f"{name}: {error}")
            else:
                begun += [name] if begins else []
        if problems:
            raise (PromptTooLongError if too_long else ValueError)(_listed(problems))
        self._warn_begun(begun)
        return encoded

    def _token_ids(self, prompt: PlainPrompt) -> tuple[list[int], bool]:
        """The tokens of a prompt, and whether the token that begins texts was in it already."""
        bos_id = self.base.info.bos_id
        if isinstance(prompt, str):
            _require_characters(prompt)
            token_ids = list(self.base.tokenizer(prompt, verbose=False)["input_ids"])
            if token_ids[:2] == [bos_id, bos_id] and self._adds_bos:
                return token_ids[1:], True
        elif _is_dialogue(prompt):
            token_ids = self.chat_format.encode_prompt(prompt).tolist()
        else:
            token_ids = cast(list[int], prompt)
        if token_ids:
            return token_ids, False
        if not isinstance(prompt, str) or bos_id is None:
            raise ValueError(
                f"{prompt!r} has no tokens, and the tokenizer of {self.base.path} has "
                f"{'no' if bos_id is None else 'a'} beginning-of-sequence token: give some text"
            )
        return [bos_id], False

    @functools.cached_property
    def _adds_bos(self) -> bool:
        """Whether the base's tokenizer itself begins every text with the token for it."""
        begins = list(self.base.tokenizer("", verbose=False)["input_ids"])[:1]
        return begins == [self.base.info.bos_id]

    def _warn_begun(self, names: Sequence[str]) -> None:
        """Warn once of texts that spell out the token that begins them."""
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            logger.warning(
                "%s%s: the text begins with %s, which the tokenizer of %s adds by itself: it is "
                "read once; leave it out of the text",
                names[0],
                more,
                self.base.tokenizer.bos_token,
                self.base.path,
            )

    def _encode(
        self, prompt: PlainPrompt, token_ids: list[int], option: GenerationOptions, row: int
    ) -> EncodedPrompt:
        messages = None
        if _is_dialogue(prompt):
            messages = prompt
            ends = (*option.stop_ids, *self.chat_format.stop_ids)
            option = dataclasses.replace(option, stop_ids=ends)
        texts = [own.read_prompt(token_ids, messages) for own in self.own_vocabularies if own]
        return EncodedPrompt(token_ids, option, row, tuple(texts))

    def check_logit_bias(self, option: GenerationOptions) -> None:
        """Raise a ValueError if a prompt's options name tokens that the base does not have."""
        known = self.base.info.vocab_size
        if strange := [i for i in dict(option.logit_bias) if not 0 <= i < known]:
            raise ValueError(f"logit_bias: token ids outside [0, {known}): {strange[:5]}")

    def _check_length(self, token_ids: Sequence[int]) -> None:
        """Raise if a prompt has more tokens than the context."""
        length = len(token_ids)
        if length > self.context:
            raise PromptTooLongError(
                f"{length} tokens are {length - self.context} more than the context of "
                f"{self.context} tokens (that of {self.context_of}): shorten the prompt"
            )

    def _check(self, prompt: EncodedPrompt) -> None:
        """Raise unless this prompt, which is not too long for the base, can be decoded."""
        known = self.base.info.vocab_size
        mapped = [own for own in self.own_vocabularies if own]
        for own, text in zip(mapped, prompt.own_texts, strict=True):
            if len(text.tokens) > own.context:
                raise PromptTooLongError(
                    f"{len(text.tokens)} tokens are {len(text.tokens) - own.context} more than the "
                    f"context of {own.context} tokens of {own.name}, in its own vocabulary: "
                    "shorten the prompt"
                )
        if strange := [i for i in prompt.token_ids if not 0 <= i < known]:
            raise ValueError(f"token ids outside [0, {known}): {strange[:5]}")
        self.check_logit_bias(prompt.options)
        if prompt.options.policy is not None:
            check_policy(prompt.options.policy, where="policy")
        strengths = prompt.options.strengths
        if strengths is not None and len(strengths) != len(self.values):
            raise ValueError(f"{len(strengths)} strengths for {len(self.values)} value network(s)")


def _require_characters(text: str) -> None:
    """Raise a ValueError for a lone surrogate, which JSON may hold and tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate, {text[error.start]!r}, at character {error.start}, "
            "which is not a character: leave it out"
        ) from error


def make_prompt_reader(sources: ComposedSources) -> PromptReader:
    """Make the reader of a composition.

    Args:
        sources: its models, checked against each other.

    Returns:
        The reader.
    """
    base, values = sources.base, sources.values
    own: list[OwnVocabulary | None] = [None] * len(values)
    if any(value.described_map for value in values):
        base_codec = TextCodec(base.tokenizer, base.info)
        own = [read_own_vocabulary(base_codec, value) for value in values]
    return reader_under(sources, values, own)


def reader_under(
    sources: ComposedSources,
    values: Sequence[ModelSource],
    own_vocabularies: Sequence[OwnVocabulary | None],
) -> PromptReader:
    """Make the reader of a base under some value networks.

    Args:
        sources: of them the base and the draft count.
        values: the value networks, checked against the base; the first one's template is that of
            dialogues.
        own_vocabularies: how each of them reads text.

    Returns:
        The reader that the base and these value networks have without others.
    """
    reading = [sources.base, *(value for value in values if value.described_map is None)]
    if sources.draft is not None:
        reading.append(sources.draft)
    # The network with the smallest context among those that read the base's tokens.
    smallest = min(reading, key=lambda each: each.context)
    return PromptReader(
        sources.base, tuple(values), smallest.context, smallest.label, tuple(own_vocabularies)
    )


def read_own_vocabulary(base_codec: TextCodec, value: ModelSource) -> OwnVocabulary | None:
    """Describe how a value network reads text; None where it shares the base's vocabulary.

    Args:
        base_codec: the base's tokenizer.
        value: the value network, with its map.
    """
    if value.described_map is None:
        return None
    return make_own_vocabulary(
        base_codec,
        TextCodec(value.tokenizer, value.info),
        value.described_map.metadata.special_pairs,
        name=value.label,
        context=value.context,
        tokenizer=value.tokenizer,
        chat_template=value.chat_template,
        value_stop_ids=value.stop_ids,
    )


def _is_dialogue(prompt: PlainPrompt) -> TypeGuard[list[Message]]:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Message)


def _options_of(
    options: Options, keywords: GenerationKeywords, *, number: int
) -> list[GenerationOptions]:
    """Options of each prompt."""
    if isinstance(options, GenerationOptions | Mapping) or not isinstance(options, Iterable):
        return [options_with(options, keywords)] * number
    each = [options_with(one, keywords) for one in options]
    if len(each) != number:
        raise ValueError(f"{number} prompts, but {len(each)} options: give one per prompt")
    return each


def _listed(problems: list[str]) -> str:
    more = len(problems) - _MOST_PROBLEMS_NAMED
    return "; ".join(problems[:_MOST_PROBLEMS_NAMED]) + (f"; and {more} more" if more > 0 else "")
