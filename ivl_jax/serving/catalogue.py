"""The models that clients may name: the base, each value network, and each as `base+value`.

In: a model's name and strengths, as a request gives them. Out: prompts for the engine, exactly
those that the base has under the same value networks alone: their template, their stop ids, their
context. A value network that a request does not use has strength 0 in its row.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.config import GenerationOptions, strength_problem
from ivl_jax.data.chat import ChatTemplateError
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.engine import Engine
from ivl_jax.decoding.given_prompts import Prompt
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.own_vocabulary import OwnText, OwnVocabulary
from ivl_jax.decoding.prompts import PromptReader, part_of_reader
from ivl_jax.decoding.requests import EncodedPrompt, PromptTooLongError
from ivl_jax.serving.errors import ApiError, invalid


class ServedModel(NamedTuple):
    """A name that requests may use."""

    name: str
    value: int | None
    """Index of its value network; None: the base alone."""


class Chosen(NamedTuple):
    """What a request decodes with."""

    reader: PromptReader
    strengths: tuple[float, ...]
    """α of every value network that is loaded."""


class Catalogue:
    """The models of one composition, by name.

    Args:
        model: the composed model.
        sources: its models before their weights.
        base: the base's name.
        values: the name of each value network, in order.
        longest: tokens that a prompt and its answer may take together; 0: the context.

    Attributes:
        model: As given.
        served: Every name, the base's first.
    """

    def __init__(
        self,
        model: ComposedModel,
        sources: ComposedSources,
        *,
        base: str,
        values: Sequence[str],
        longest: int = 0,
    ) -> None:
        self.model, self.values = model, tuple(values)
        self._sources, self._longest = sources, longest
        self.served = {
            name: ServedModel(name, value)
            for name, value in [
                (base, None),
                *((name, index) for index, name in enumerate(values)),
                *((f"{base}+{name}", index) for index, name in enumerate(values)),
            ]
        }
        # A dialogue or two per combination: a client that tries them all must not fill the memory.
        self._reader = functools.lru_cache(maxsize=64)(self._make_reader)

    @property
    def context(self) -> int:
        """Tokens that a row of the engine may hold."""
        return self._reader(()).context

    def engine(self, limits: EngineLimits) -> Engine:
        """Make the engine that decodes what `encode` returns.

        Args:
            limits: of the server.
        """
        # Each request brings the stop ids and the context of the networks that it uses.
        return self.model.engine(limits, stop_ids=(), context=self.context)

    def choose(self, name: str, strengths: Mapping[str, float]) -> Chosen:
        """Find what a request decodes with.

        Args:
            name: the model's name.
            strengths: α by name of a value network, in place of its default.

        Returns:
            The reader of its prompts, and all strengths.

        Raises:
            ApiError: there is no such model or value network, or a strength cannot be used.
        """
        served = self.served.get(name)
        if served is None:
            raise ApiError(
                404,
                f"the model {name!r} does not exist: expected one of {', '.join(self.served)}",
                param="model",
                code="model_not_found",
            )
        alphas = [0.0] * len(self.values)
        used = [] if served.value is None else [served.value]
        for index in used:
            alphas[index] = self.model.strengths[index]
        for value, alpha in strengths.items():
            if value not in self.values:
                raise invalid(
                    f"strengths: no value network is named {value!r}; expected "
                    f"{', '.join(self.values) or 'none: the base is served alone'}",
                    "strengths",
                )
            if problem := strength_problem(alpha):
                raise invalid(f"strengths: that of {value} {problem}", "strengths")
            alphas[self.values.index(value)] = float(alpha)
        named = {self.values.index(value) for value, alpha in strengths.items() if alpha}
        used += sorted(named - set(used))
        return Chosen(self._reader(tuple(used)), tuple(alphas))

    def encode(
        self, chosen: Chosen, prompts: Sequence[Prompt], options: GenerationOptions, *, choices: int
    ) -> list[EncodedPrompt]:
        """Encode and check prompts; takes as long as a chat template does.

        Args:
            chosen: of `choose`.
            prompts: texts, token ids or dialogues.
            options: how they are continued.
            choices: samples of each prompt.

        Returns:
            The samples of the first prompt, then those of the second, and so on.

        Raises:
            ApiError: a prompt that cannot be decoded.
        """
        reader = chosen.reader
        try:
            prepared = reader.prepare(list(prompts), options)
        except PromptTooLongError as error:
            raise invalid(str(error), "messages", "context_length_exceeded") from error
        except (ChatTemplateError, ValueError, TypeError) as error:
            raise invalid(str(error), "messages") from error
        return [
            self._in_engine(prompt, chosen, sample=sample)
            for prompt in prepared
            for sample in range(choices)
        ]

    def _in_engine(self, prompt: EncodedPrompt, chosen: Chosen, *, sample: int) -> EncodedPrompt:
        """A prompt of some value networks as one of all of them."""
        reader, option, length = chosen.reader, prompt.options, len(prompt.token_ids)
        longest = min(reader.context, self._longest or reader.context)
        if length >= longest:
            raise invalid(
                f"the prompt has {length} tokens, which leaves no room for an answer: prompt and "
                f"answer together may have {longest}; shorten the prompt by at least "
                f"{length - longest + 1} tokens",
                "messages",
                "context_length_exceeded",
            )
        option = dataclasses.replace(
            option,
            max_new_tokens=min(option.max_new_tokens, longest - length),
            strengths=chosen.strengths,
            stop_ids=(*reader.stop_ids, *option.stop_ids),
        )
        return EncodedPrompt(
            prompt.token_ids, option, sample, self._own_texts(prompt, reader.own_vocabularies)
        )

    def _own_texts(
        self, prompt: EncodedPrompt, read: Sequence[OwnVocabulary | None]
    ) -> tuple[OwnText, ...]:
        """What every value network with its own vocabulary reads: nothing, where it is not used."""
        mapped = [own for own in read if own]
        texts = dict(zip(map(id, mapped), prompt.own_texts, strict=True))
        return tuple(
            texts[id(own)] if id(own) in texts else own.unread()
            for own in self.model.own_vocabularies
            if own
        )

    def _make_reader(self, used: tuple[int, ...]) -> PromptReader:
        return part_of_reader(self.model.prompts, self._sources, used)
