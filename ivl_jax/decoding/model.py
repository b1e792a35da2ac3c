"""Text in, text out: a base model with its value networks, ready to generate.

In: prompts as texts, dialogues or token ids. Out: `Generation`s, or pieces of text as they become
final. `ivl_jax.decoding.compose` makes the model.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack, overload

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.config import FULL_STRENGTH, GenerationKeywords, StrengthPolicy
from ivl_jax.data.chat import ChatFormat
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.engine import DEFAULT_LIMITS, Engine, Progress
from ivl_jax.decoding.engine_model import EngineModel
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.given_prompts import OnePrompt, Prompt, is_one_prompt, plain_prompt
from ivl_jax.decoding.own_vocabulary import OwnVocabulary
from ivl_jax.decoding.programs import Programs
from ivl_jax.decoding.prompts import GREEDY, Options, PromptReader
from ivl_jax.decoding.requests import EncodedPrompt, GenerationOptions
from ivl_jax.decoding.streaming import Detokenizer, RowText
from ivl_jax.profiling import NO_PROFILE, StepProfile
from ivl_jax.weights.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any


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
        policy: How much of the strengths applies at each position, where a request does not say.
        proposer: Where proposals come from; None: from the composition's draft, if it has one.
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
    policy: StrengthPolicy = FULL_STRENGTH
    proposer: Proposer | None = field(default=None, repr=False)

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
        """How each value network reads text; None for those that share the base's vocabulary."""
        return self.prompts.own_vocabularies

    def encode(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into token ids.

        Args:
            prompt: a text, which gets the special tokens the tokenizer puts around texts ("" is the
                beginning-of-sequence token alone, and one that is spelled out at the beginning is
                not added again); a dialogue, which goes through `chat_format`; or token ids, which
                stay as they are.

        Returns:
            Token ids, at least one.

        Raises:
            ValueError: no tokens: "" and a tokenizer without a beginning-of-sequence token, or an
                empty list.
        """
        return self.prompts.encode(prompt)

    @overload
    def generate(
        self,
        prompts: OnePrompt,
        options: Options = GREEDY,
        *,
        batch_size: int = 8,
        **keywords: Unpack[GenerationKeywords],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        options: Options = GREEDY,
        *,
        batch_size: int = 8,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: Options = GREEDY,
        *,
        batch_size: int = 8,
        **keywords: Unpack[GenerationKeywords],
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several.

            model.generate("Once upon a time", max_new_tokens=20).text
            [one.text for one in model.generate(["Once", "There was"], temperature=0.8, seed=1)]
            model.generate([{"role": "user", "content": "Explain tides."}]).text

        Args:
            prompts: one text, one dialogue or the token ids of one prompt; or a list of these.
            options: one for all prompts, or one per prompt.
            batch_size: prompts decoded together.
            keywords: fields of `GenerationOptions` that take the place of those of the options.

        Returns:
            The generation of one prompt; of several a list, one each, in order.

        Raises:
            TypeError: not a prompt, or an option that does not exist; says what is expected.
            PromptTooLongError: a prompt exceeds the context; all such prompts are named, before
                anything is computed.
            ValueError: a prompt without tokens or with ids outside the vocabulary, options out of
                their range, or strengths that do not match the value networks.
        """
        prepared = self.prepare(prompts, options, **keywords)
        generations = list(self.generate_prepared(prepared, batch_size=batch_size))
        return generations[0] if is_one_prompt(prompts) else generations

    def prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        options: Options = GREEDY,
        *,
        names: Sequence[str] = (),
        **keywords: Unpack[GenerationKeywords],
    ) -> list[EncodedPrompt]:
        """Encode and check prompts, before anything is computed.

        Args:
            prompts: as `generate` takes them, like the options.
            options: one for all prompts, or one per prompt.
            names: what to call each prompt in messages; empty: "prompt 0", "prompt 1", …
            keywords: fields of `GenerationOptions` that take the place of those of the options.

        Returns:
            One encoded prompt each, in order.

        Raises:
            TypeError: as `generate`, like the rest.
            PromptTooLongError: a prompt exceeds the context.
            ValueError: a prompt or options that cannot be used.
        """
        return self.prompts.prepare(prompts, options, names=names, keywords=keywords)

    def engine(
        self,
        limits: EngineLimits = DEFAULT_LIMITS,
        *,
        stop_ids: Sequence[int] | None = None,
        context: int | None = None,
    ) -> Engine:
        """Make an engine, which decodes prompts that come and go while others are decoded.

        Args:
            limits: how many requests it decodes together, and how long they may be.
            stop_ids: ids that end every row; None: those of the model. Requests that use only some
                of the value networks bring the ids of these.
            context: tokens a row may hold; None: the context of the model. It may be as large as
                that of the base where requests are held to the context of the networks they use.

        Returns:
            The engine; it takes what `prepare` returns. Engines share the model and its programs.
        """
        base, values = self.prompts.base, self.prompts.values
        model = EngineModel(
            self.composition,
            self.params,
            self.programs,
            names=(base.label, *(value.label for value in values)),
            own_vocabularies=tuple(own for own in self.own_vocabularies if own),
            context=self.context if context is None else context,
            stop_ids=self.stop_ids if stop_ids is None else tuple(stop_ids),
            strengths=self.strengths,
            policy=self.policy,
            proposer=self.proposer,
        )
        # An engine outlives its model, and then holds the value networks that it still has.
        new_text = functools.partial(_row_text, self.token_bytes, self.strips_leading_space)
        return Engine(model, new_text=new_text, limits=limits)

    def generate_prepared(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        batch_size: int = 8,
        chunk_tokens: int = 16,
        profile: StepProfile = NO_PROFILE,
        after_step: Callable[[Sequence[Progress]], object] = lambda progress: None,
    ) -> Iterator[Generation]:
        """Continue prepared prompts; when one ends, the next takes its row.

        Args:
            prompts: what `prepare` returned, or a part of it.
            batch_size: prompts decoded together.
            chunk_tokens: tokens between two looks of the host at the texts, at most: how late a
                stop string is seen. 1 in any case where a value network has its own vocabulary:
                the host reads for it.
            profile: traces some of the steps between two looks.
            after_step: called after each look with what it has brought; an exception that it
                raises ends the generation.

        Yields:
            One generation per prompt, in order, as soon as it and those before it are done.
        """
        if not prompts:
            return
        rows = min(batch_size, len(prompts))
        engine = self.engine(EngineLimits(max_rows=rows, least_rows=rows))
        order = iter([engine.submit(prompt) for prompt in prompts])
        done: dict[int, Generation] = {}
        following = next(order, None)
        for step in itertools.count():
            if engine.idle:
                return
            with profile.step(step, None):
                progress = engine.step(max_tokens=chunk_tokens)
            after_step(progress)
            done |= {one.id: one.generation for one in progress if one.generation is not None}
            while following in done:
                yield done.pop(following)
                following = next(order, None)

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | Mapping[str, Any] = GREEDY,
        *,
        chunk_tokens: int = 4,
        **keywords: Unpack[GenerationKeywords],
    ) -> Iterator[str | Generation]:
        """Continue one prompt and yield its text as it becomes final.

        Args:
            prompt: a text, a dialogue or token ids.
            options: how it is continued.
            chunk_tokens: tokens computed between two pieces.
            keywords: fields of `GenerationOptions` that take the place of those of the options.

        Returns:
            An iterator over pieces of text, none empty, of whole characters only, which together
            are the generation's text; its last item is the `Generation` itself. What is wrong with
            the prompt is raised by this call.

        Raises:
            TypeError: as `generate`, like the rest.
            PromptTooLongError: the prompt exceeds the context.
            ValueError: a prompt or options that cannot be used.
        """
        (prepared,) = self.prepare([plain_prompt(prompt)], options, **keywords)
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
        engine = self.engine(EngineLimits(max_rows=1))
        engine.submit(prompt)
        for step in itertools.count():
            if engine.idle:
                return
            with profile.step(step, None):
                progress = engine.step(max_tokens=chunk_tokens)
            for one in progress:
                if one.piece:
                    yield one.piece
                if one.generation is not None:
                    yield one.generation


def _row_text(
    token_bytes: Sequence[bytes], strips_leading_space: bool, prompt: EncodedPrompt
) -> RowText:
    starts_text = not any(token_bytes[token_id] for token_id in prompt.token_ids)
    strip = strips_leading_space and starts_text
    return RowText(Detokenizer(token_bytes, strip_leading_space=strip), prompt.options.stop)
