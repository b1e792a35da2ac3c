"""Text in, text out: a base model with its value networks, ready to generate.

In: prompts as texts, dialogues or token ids. Out: `Generation`s, or pieces of text as they become
final. `ivl_jax.decoding.compose` makes the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.data.chat import ChatFormat
from ivl_jax.decoding.device.programs import Programs
from ivl_jax.decoding.engine import Decoder, Progress, decode_rows
from ivl_jax.decoding.own_vocabulary import OwnVocabulary
from ivl_jax.decoding.prompts import GREEDY, Prompt, PromptReader
from ivl_jax.decoding.requests import EncodedPrompt, GenerationOptions
from ivl_jax.decoding.streaming import Detokenizer, FinishReason, RowText
from ivl_jax.profiling import NO_PROFILE, StepProfile
from ivl_jax.weights.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        text: What was generated, cut before a stop string; special tokens stand for nothing.
        token_ids: Generated ids. The last one is the stop id that ended the row, or the token that
            completed the stop string.
        finish_reason: `eos` (a stop id), `stop_string`, or `length` (the limit asked for, or the
            end of the context).
        prompt_tokens: Tokens of the prompt.
        judged_proposals: Tokens that a draft proposed, up to each first one that was not kept; 0
            without a draft. Not compared.
        accepted_proposals: Those that were kept. Not compared.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    judged_proposals: int = field(default=0, compare=False)
    accepted_proposals: int = field(default=0, compare=False)


@dataclass(frozen=True, eq=False)
class ComposedModel:
    """A base model and any number of value networks, each with its strength.

    Greedy text depends neither on the batch and its padding nor on the mesh, but for near-ties:
    where two logits differ by less than the rounding of a differently shaped sum (about 1e-5 in
    float32), either may win. With a draft the base reads several tokens at once, whose sums are
    shaped differently too; samples then keep their distribution, but which ones a seed gives also
    depends on how many tokens were proposed, and so on the batch.

    Attributes:
        composition: The static half.
        params: The arrays.
        programs: The compiled programs.
        base: The base model, its parameters laid out for decoding.
        values: The value networks, or language models in their place, likewise.
        strengths: α of each value network, where a request names none.
        prompts: How prompts become tokens, without the weights.
        token_bytes: Bytes of each id; empty for special tokens.
        strips_leading_space: Whether the tokenizer drops the space at the start of a text.
    """

    composition: Composition = field(repr=False)
    params: ComposedParams = field(repr=False)
    programs: Programs = field(repr=False)
    base: LanguageModel = field(repr=False)
    values: tuple[ValueNetwork | LanguageModel, ...]
    strengths: tuple[float, ...]
    prompts: PromptReader = field(repr=False)
    token_bytes: tuple[bytes, ...] = field(repr=False)
    strips_leading_space: bool

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, in which everything is generated."""
        return self.base.tokenizer

    @property
    def chat_format(self) -> ChatFormat:
        """How dialogues become tokens: the first value network's format, else the base's own."""
        return self.prompts.chat_format

    @property
    def context(self) -> int:
        """Tokens a row may hold: the smallest context of all networks."""
        return self.prompts.context

    @property
    def context_of(self) -> str:
        """The name of the network with that context."""
        return self.prompts.context_of

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a row: those of the base and of every value network."""
        return self.prompts.stop_ids

    @property
    def own_vocabularies(self) -> tuple[OwnVocabulary | None, ...]:
        """The text side of each value network; None for those that share the base's vocabulary."""
        return self.prompts.own_vocabularies

    def encode(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into token ids.

        Args:
            prompt: a text, which gets the special tokens the tokenizer puts around texts ("" is the
                beginning-of-sequence token alone); a dialogue, which goes through `chat_format`; or
                token ids, which stay as they are.

        Returns:
            Token ids, at least one.

        Raises:
            ValueError: no tokens: "" and a tokenizer without a beginning-of-sequence token, or an
                empty list.
        """
        return self.prompts.encode(prompt)

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] = GREEDY,
        *,
        batch_size: int = 8,
    ) -> list[Generation]:
        """Continue prompts.

        Args:
            prompts: texts, dialogues or token ids.
            options: one for all prompts, or one a prompt.
            batch_size: prompts decoded together.

        Returns:
            One generation a prompt, in order.

        Raises:
            PromptTooLongError: a prompt exceeds the context; all such prompts are named, before
                anything is computed.
            ValueError: a prompt without tokens or with ids outside the vocabulary, or strengths
                that do not match the value networks.
        """
        return list(self.generate_prepared(self.prepare(prompts, options), batch_size=batch_size))

    def prepare(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] = GREEDY,
        *,
        names: Sequence[str] = (),
    ) -> list[EncodedPrompt]:
        """Encode and check prompts, before anything is computed.

        Args:
            prompts: texts, dialogues or token ids.
            options: one for all prompts, or one a prompt.
            names: what to call each prompt in messages; empty: "prompt 0", "prompt 1", …

        Returns:
            One encoded prompt each, in order.

        Raises:
            PromptTooLongError: as `generate`.
            ValueError: as `generate`.
        """
        return self.prompts.prepare(prompts, options, names=names)

    def generate_prepared(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        batch_size: int = 8,
        chunk_tokens: int = 16,
        profile: StepProfile = NO_PROFILE,
    ) -> Iterator[Generation]:
        """Continue prepared prompts; when one ends, the next takes its row.

        Args:
            prompts: what `prepare` returned, or a part of it.
            batch_size: prompts decoded together.
            chunk_tokens: tokens between two looks of the host at the texts, at most: how late a
                stop string is seen. 1 in any case where a value network has its own vocabulary:
                the host reads for it.
            profile: traces some of the steps between two looks.

        Yields:
            One generation a prompt, in order, as soon as it and those before it are done.
        """
        done: dict[int, Generation] = {}
        following = 0
        looks = self._decode(
            prompts, batch_size=batch_size, chunk_tokens=chunk_tokens, profile=profile
        )
        for progress in looks:
            for row in progress:
                if row.text.finish != FinishReason.RUNNING:
                    done[row.index] = _generation(prompts[row.index], row)
            while following in done:
                yield done.pop(following)
                following += 1

    def stream(
        self, prompt: Prompt, options: GenerationOptions = GREEDY, *, chunk_tokens: int = 4
    ) -> Iterator[str | Generation]:
        """Continue one prompt and yield its text as it becomes final.

        Args:
            prompt: a text, a dialogue or token ids.
            options: how it is continued.
            chunk_tokens: tokens computed between two pieces.

        Returns:
            An iterator over pieces of text, none empty, of whole characters only, which together
            are the generation's text; its last item is the `Generation` itself. What is wrong with
            the prompt is raised by this call.

        Raises:
            PromptTooLongError: as `generate`.
            ValueError: as `generate`.
        """
        (prepared,) = self.prepare([prompt], options)
        return self.stream_prepared(prepared, chunk_tokens=chunk_tokens)

    def stream_prepared(
        self, prompt: EncodedPrompt, *, chunk_tokens: int = 4, profile: StepProfile = NO_PROFILE
    ) -> Iterator[str | Generation]:
        """Continue one prepared prompt; as `stream`.

        Args:
            prompt: of `prepare`.
            chunk_tokens: tokens computed between two pieces.
            profile: traces some of the steps between two pieces.

        Yields:
            As `stream`.
        """
        looks = self._decode([prompt], batch_size=1, chunk_tokens=chunk_tokens, profile=profile)
        for (row,) in looks:
            if row.piece:
                yield row.piece
            if row.text.finish != FinishReason.RUNNING:
                yield _generation(prompt, row)

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        batch_size: int,
        chunk_tokens: int,
        profile: StepProfile = NO_PROFILE,
    ) -> Iterator[list[Progress]]:
        decoder = Decoder(
            self.composition,
            self.params,
            self.programs,
            tuple(own for own in self.own_vocabularies if own),
            self.context,
            self.stop_ids,
            self.strengths,
        )
        return decode_rows(
            decoder,
            prompts,
            new_text=self._row_text,
            batch_size=batch_size,
            chunk_tokens=chunk_tokens,
            profile=profile,
        )

    def _row_text(self, prompt: EncodedPrompt) -> RowText:
        starts_text = not any(self.token_bytes[token_id] for token_id in prompt.token_ids)
        strip = self.strips_leading_space and starts_text
        detokenizer = Detokenizer(self.token_bytes, strip_leading_space=strip)
        return RowText(detokenizer, prompt.options.stop)


def _generation(prompt: EncodedPrompt, row: Progress) -> Generation:
    text = row.text
    return Generation(
        text=text.text,
        token_ids=tuple(text.token_ids),
        finish_reason=text.finish.name.lower(),
        prompt_tokens=len(prompt.token_ids),
        judged_proposals=row.judged,
        accepted_proposals=row.accepted,
    )
