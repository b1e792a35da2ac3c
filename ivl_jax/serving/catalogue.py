"""The models that clients may name: the base, each value network, and each as `base+value`.

In: a model's name and strengths, as a request gives them. Out: prompts for the engine, exactly
those that the base has under the same value networks alone: their template, their stop ids, their
context. Value networks come and go; one that a request holds stays.

Everything but `encode` is called in the event loop.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.composed.sources import ModelSource
from ivl_jax.config import GenerationOptions, strength_problem
from ivl_jax.data.chat import ChatTemplateError
from ivl_jax.decoding.given_prompts import Prompt
from ivl_jax.decoding.own_vocabulary import OwnVocabulary
from ivl_jax.decoding.prompts import PromptReader, reader_under
from ivl_jax.decoding.requests import EncodedPrompt, PromptTooLongError
from ivl_jax.serving.errors import ApiError, invalid


@dataclass(eq=False)
class ServedValue:
    """A value network that requests may use.

    Attributes:
        name: What requests call it.
        place: What the engine calls it.
        source: Its tokenizer, template and stop ids.
        own_vocabulary: How it reads text; None where it shares the base's vocabulary.
        strength: α where a request names none.
        loaded: When it was loaded (seconds since 1970).
        device_bytes: Bytes of its parameters on each device.
        holders: Requests that use it, from their arrival to their end.
        leaving: Whether it is being unloaded: no request may use it, but its place is taken.
    """

    name: str
    place: int
    source: ModelSource
    own_vocabulary: OwnVocabulary | None
    strength: float
    loaded: int
    device_bytes: int
    holders: int = 0
    leaving: bool = False


class Chosen(NamedTuple):
    """What a request decodes with."""

    reader: PromptReader
    values: tuple[ServedValue, ...]
    """The value networks that it uses, in the reader's order."""
    strengths: tuple[float, ...]
    """α of each of them."""


class Catalogue:
    """The models of one server, by name.

    Args:
        sources: of them the base and the draft count.
        base: the base's name.
        started: when it was loaded (seconds since 1970).
        longest: tokens that a prompt and its answer may take together; 0: the context.

    Attributes:
        base: As given.
        started: As given.
        loaded: The value networks that are loaded, by name; those that are leaving among them.
    """

    def __init__(
        self, sources: ComposedSources, *, base: str, started: int, longest: int = 0
    ) -> None:
        self.base, self.started = base, started
        self.loaded: dict[str, ServedValue] = {}
        self._sources = dataclasses.replace(sources, values=(), unknown_ids=())
        self._longest = longest
        # A dialogue or two per combination: a client that tries them all must not fill the memory.
        self._reader = functools.lru_cache(maxsize=64)(self._make_reader)

    @property
    def values(self) -> dict[str, ServedValue]:
        """The value networks that requests may use, by name."""
        return {name: value for name, value in self.loaded.items() if not value.leaving}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use, the base's first."""
        values = self.values
        return (self.base, *values, *(f"{self.base}+{name}" for name in values))

    @property
    def context(self) -> int:
        """Tokens that a row of the engine may hold."""
        return self._reader(()).context

    def free_place(self) -> int:
        """The smallest place at which there is no value network."""
        taken = {value.place for value in self.loaded.values()}
        return next(place for place in range(len(taken) + 1) if place not in taken)

    def add(self, value: ServedValue) -> None:
        """Let requests use a value network, which the engine has."""
        self.loaded[value.name] = value

    @contextlib.contextmanager
    def removing(self, name: str) -> Iterator[ServedValue]:
        """Let no further request use a value network, and forget it once the block has ended.

        Where the block fails, requests may use it again.

        Args:
            name: its name.

        Yields:
            The value network; its place stays taken until the block has ended.

        Raises:
            ApiError: there is none of this name (404), or requests use it (409).
        """
        value = self.values.get(name)
        if value is None:
            raise ApiError(
                404,
                f"no value network is named {name!r:.100}; loaded: "
                f"{', '.join(self.values) or 'none'}",
                code="value_not_found",
            )
        if value.holders:
            raise ApiError(
                409,
                f"the value network {name} is in use by {value.holders} request(s) that run or "
                "wait: try again when they have ended",
                code="value_in_use",
                headers={"Retry-After": "1"},
            )
        value.leaving = True
        try:
            yield value
        except Exception:
            value.leaving = False
            raise
        del self.loaded[name]
        self._reader.cache_clear()

    @contextlib.contextmanager
    def hold(self, chosen: Chosen) -> Iterator[None]:
        """Keep the value networks of a request loaded."""
        for value in chosen.values:
            value.holders += 1
        try:
            yield
        finally:
            for value in chosen.values:
                value.holders -= 1

    def choose(self, name: str, strengths: Mapping[str, float]) -> Chosen:
        """Find what a request decodes with.

        Args:
            name: the model's name.
            strengths: α by name of a value network, in place of its default.

        Returns:
            The reader of its prompts, and the value networks that it uses.

        Raises:
            ApiError: there is no such model or value network, or a strength cannot be used.
        """
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r:.100} does not exist: expected one of {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        alphas: dict[str, float] = {}
        if name != self.base:
            first = name.removeprefix(f"{self.base}+")
            alphas[first] = self.values[first].strength
        for value, alpha in strengths.items():
            if value not in self.values:
                raise invalid(
                    f"strengths: no value network is named {value!r:.100}; expected "
                    f"{', '.join(self.values) or 'none: the base is served alone'}",
                    "strengths",
                )
            if problem := strength_problem(alpha):
                raise invalid(f"strengths: that of {value} {problem}", "strengths")
        # The model's own value network comes first: its template is that of dialogues.
        for value in self.values:
            alpha = float(strengths.get(value, 0.0))
            if alpha or (value in alphas and value in strengths):
                alphas[value] = alpha
        values = tuple(self.values[value] for value in alphas)
        return Chosen(self._reader(values), values, tuple(alphas.values()))

    def strengths(self, chosen: Chosen) -> dict[str, float]:
        """The strength of every value network that is loaded, by name."""
        named = {value.name: alpha for value, alpha in zip(*chosen[1:], strict=True)}
        return dict.fromkeys(self.values, 0.0) | named

    def encode(
        self,
        chosen: Chosen,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        *,
        choices: int,
        field: str,
    ) -> list[EncodedPrompt]:
        """Encode and check prompts; takes as long as a chat template does.

        Args:
            chosen: of `choose`.
            prompts: texts, token ids or dialogues.
            options: how they are continued.
            choices: samples of each prompt.
            field: what the body calls the prompts.

        Returns:
            The samples of the first prompt, then those of the second, and so on.

        Raises:
            ApiError: a prompt that cannot be decoded.
        """
        reader = chosen.reader
        try:
            reader.check_logit_bias(options)
        except ValueError as error:
            raise invalid(str(error), "logit_bias") from error
        try:
            several = len(prompts) > 1
            names = [f"{field}[{row}]" if several else field for row in range(len(prompts))]
            prepared = reader.prepare(list(prompts), options, names=names)
        except PromptTooLongError as error:
            raise invalid(str(error), field, "context_length_exceeded") from error
        except (ChatTemplateError, ValueError, TypeError) as error:
            raise invalid(str(error), field) from error
        return [
            self._in_engine(prompt, chosen, sample=sample, field=field)
            for prompt in prepared
            for sample in range(choices)
        ]

    def _in_engine(
        self, prompt: EncodedPrompt, chosen: Chosen, *, sample: int, field: str
    ) -> EncodedPrompt:
        """A prompt with the limits and the stop ids of the networks that it uses."""
        reader, option, length = chosen.reader, prompt.options, len(prompt.token_ids)
        longest = reader.context
        if length >= longest:
            raise invalid(
                f"the prompt has {length} tokens, which leaves no room for an answer: prompt and "
                f"answer together may have {longest}; shorten the prompt by at least "
                f"{length - longest + 1} tokens",
                field,
                "context_length_exceeded",
            )
        option = dataclasses.replace(
            option,
            max_new_tokens=min(option.max_new_tokens, longest - length),
            strengths=chosen.strengths,
            stop_ids=(*reader.stop_ids, *option.stop_ids),
        )
        places = tuple(value.place for value in chosen.values)
        return EncodedPrompt(prompt.token_ids, option, sample, prompt.own_texts, places)

    def _make_reader(self, values: tuple[ServedValue, ...]) -> PromptReader:
        reader = reader_under(
            self._sources,
            [value.source for value in values],
            [value.own_vocabulary for value in values],
        )
        if not 0 < self._longest < reader.context:
            return reader
        # A longer prompt is refused before value networks with their own vocabulary read it.
        return dataclasses.replace(reader, context=self._longest, context_of="--max-request-tokens")
