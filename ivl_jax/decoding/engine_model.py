"""What an engine decodes with: a base under any set of its value networks.

In: a composed model, then value networks that are added and removed while it decodes. Out: for each
set of value networks an `EngineModel`, with programs that run these alone; and what a prompt uses
of them.

A value network is known by its place, a number that stays the same while it is loaded. Programs are
kept per composition, which holds no arrays: value networks of one architecture share them. Of both,
sets and compositions, those used last are kept: requests choose among exponentially many.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from ivl_jax.composed.network import ComposedParams, Composition, Network, ValueArrays
from ivl_jax.config import FULL_STRENGTH, StrengthPolicy
from ivl_jax.decoding.capacity import BatchShape
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.shardings import row_multiple
from ivl_jax.decoding.own_vocabulary import OwnText, OwnVocabulary
from ivl_jax.decoding.programs import Programs, build_programs
from ivl_jax.decoding.requests import EncodedPrompt

# Sets of value networks, and shapes of batches, that are remembered.
MOST_SETS = 64
_MOST_SHAPES = 1024

Places = tuple[int, ...]
"""A set of value networks: their places, ascending."""


class EngineModel(NamedTuple):
    """What all rows of a model have in common."""

    composition: Composition
    params: ComposedParams
    programs: Programs
    names: tuple[str, ...]
    """What messages call the base and each value network."""
    own_vocabularies: tuple[OwnVocabulary, ...]
    """The tokenizer and template of each value network that has its own vocabulary."""
    context: int
    """Tokens a row may hold."""
    stop_ids: tuple[int, ...]
    """Ids that end every row."""
    strengths: tuple[float, ...]
    """α of each value network, where a prompt names none."""
    policy: StrengthPolicy = FULL_STRENGTH
    """How much of α applies at each position, where a prompt does not say."""
    proposer: Proposer | None = None
    """Where proposals come from; None: from the composition's draft, if it has one."""

    @property
    def row_multiple(self) -> int:
        """The number of rows is a multiple of this: the devices that they are split over."""
        return row_multiple(self.composition)


class EngineValue(NamedTuple):
    """One value network, ready to decode with."""

    network: Network
    arrays: ValueArrays
    label: str
    """What messages call it."""
    own_vocabulary: OwnVocabulary | None
    """How it reads text; None where it shares the base's vocabulary."""
    strength: float
    """α where a prompt names none."""


class Used(NamedTuple):
    """What a prompt uses: the value networks whose strength is not 0, by place."""

    strengths: Mapping[int, float]
    texts: Mapping[int, OwnText]
    """The prompt as those with their own vocabulary read it."""

    @property
    def places(self) -> Places:
        """The set of value networks."""
        return tuple(sorted(self.strengths))

    def of(self, places: Places) -> tuple[float, ...]:
        """The strengths of these value networks; 0 of those that are not used."""
        return tuple(self.strengths.get(place, 0.0) for place in places)


class ModelParts:
    """A model under any set of its value networks.

    Args:
        model: the base under those that there are at first; their places are 0, 1, 2, …

    Attributes:
        row_multiple: The number of rows of any batch is a multiple of this.
        stop_ids: Ids that end every row.
    """

    def __init__(self, model: EngineModel) -> None:
        own = iter(model.own_vocabularies)
        composition = model.composition
        each = zip(
            composition.values, model.params.values, model.names[1:], model.strengths, strict=True
        )
        self._values = {
            place: EngineValue(network, arrays, label, _next_own(own, network), strength)
            for place, (network, arrays, label, strength) in enumerate(each)
        }
        self.row_multiple, self.stop_ids = model.row_multiple, model.stop_ids
        # The arrays of value networks are held by `_values` and `_parts` only: removing one from
        # both frees its memory.
        self._base = model._replace(
            composition=dataclasses.replace(composition, values=()),
            params=model.params._replace(values=()),
            names=model.names[:1],
            own_vocabularies=(),
            strengths=(),
        )
        # In the order of their last use.
        self._parts: dict[Places, EngineModel] = {self.places: model}
        self._cache_bytes: dict[BatchShape, int] = {}

    @property
    def places(self) -> Places:
        """All value networks that there are."""
        return tuple(sorted(self._values))

    @property
    def most_mapped_slots(self) -> int:
        """Slots that value networks with their own vocabulary may need in a row."""
        own = [value.own_vocabulary for value in self._values.values()]
        return max((one.context for one in own if one), default=0)

    def part(self, places: Places) -> EngineModel:
        """The base under some of its value networks.

        Args:
            places: which of them.

        Returns:
            The model whose programs run no other network; the same one for the same set, unless
            many others have been asked for since.
        """
        part = self._parts.pop(places, None)
        if part is None:
            part = self._make(places)
        self._parts[places] = part
        if len(self._parts) > MOST_SETS:
            del self._parts[next(iter(self._parts))]
        return part

    def cache_bytes(self, shape: BatchShape) -> int:
        """Bytes of caches that each device holds in a batch of this shape."""
        if shape not in self._cache_bytes:
            if len(self._cache_bytes) >= _MOST_SHAPES:
                self._cache_bytes.clear()
            self._cache_bytes[shape] = self._measure_caches(shape)
        return self._cache_bytes[shape]

    def own_vocabulary(self, place: int) -> OwnVocabulary | None:
        """How a value network reads text; None where it shares the base's vocabulary."""
        return self._values[place].own_vocabulary

    def with_policy(self, prompt: EncodedPrompt) -> EncodedPrompt:
        """A prompt whose options say which strength policy it has: its own or the model's."""
        if prompt.options.policy is not None:
            return prompt
        policy = self._base.policy
        return prompt._replace(options=dataclasses.replace(prompt.options, policy=policy))

    def used(self, prompt: EncodedPrompt) -> Used:
        """Find out which value networks a prompt uses.

        Args:
            prompt: encoded for all value networks, or for those that it names.

        Returns:
            Their strengths, and the prompt as they read it.

        Raises:
            ValueError: it has a strength for more or fewer of them than it should, or names one
                that is not loaded.
        """
        places = self.places if prompt.values is None else prompt.values
        if absent := [place for place in places if place not in self._values]:
            raise ValueError(
                f"values: the prompt is encoded for the value networks at places {places}, but "
                f"there is none at {absent}: expected some of {self.places}"
            )
        given = prompt.options.strengths
        if given is not None and len(given) != len(places):
            raise ValueError(
                f"strengths: expected {len(places)}, one per value network, got {len(given)}: "
                f"{given}"
            )
        values = [self._values[place] for place in places]
        alphas = [value.strength for value in values] if given is None else given
        own_texts = iter(prompt.own_texts)
        strengths, texts = dict[int, float](), dict[int, OwnText]()
        for place, value, alpha in zip(places, values, alphas, strict=True):
            text = None if value.own_vocabulary is None else next(own_texts)
            if alpha:
                strengths[place] = float(alpha)
                if text is not None:
                    texts[place] = text
        return Used(strengths, texts)

    def check(self, value: EngineValue) -> None:
        """Refuse a value network whose caches cannot be split as the batches are.

        Raises:
            ValueError: on this mesh its batches need more rows than the others.
        """
        composition = dataclasses.replace(self._base.composition, values=(value.network,))
        needed = math.lcm(self.row_multiple, row_multiple(composition))
        if needed != self.row_multiple:
            raise ValueError(
                f"{value.label}: on this mesh it decodes batches of a multiple of {needed} rows, "
                f"but this engine was made for multiples of {self.row_multiple}: name it when the "
                "engine is made (ivl-serve: --value), or keep it whole on every device "
                "(--value-layout replicated)"
            )

    def add(self, place: int, value: EngineValue) -> None:
        """Add a value network.

        Args:
            place: where there is none.
            value: the network; `check` has passed.

        Raises:
            ValueError: the place is taken.
        """
        if place in self._values:
            raise ValueError(f"place {place} is taken by {self._values[place].label}")
        self._values[place] = value

    def remove(self, place: int) -> None:
        """Remove a value network; its arrays are free once no batch holds them."""
        del self._values[place]
        self._cache_bytes.clear()  # the next one at this place has others
        self._parts = {places: part for places, part in self._parts.items() if place not in places}

    def _measure_caches(self, shape: BatchShape) -> int:
        state = self.part(shape.values).programs.empty.eval_shape(**shape.sizes)
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
            * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((state.caches, state.speculation))
        )

    def _make(self, places: Places) -> EngineModel:
        values = [self._values[place] for place in places]
        base = self._base
        composition = dataclasses.replace(
            base.composition, values=tuple(value.network for value in values)
        )
        return base._replace(
            composition=composition,
            params=base.params._replace(values=tuple(value.arrays for value in values)),
            programs=build_programs(composition, base.proposer),
            names=(*base.names, *(value.label for value in values)),
            own_vocabularies=tuple(v.own_vocabulary for v in values if v.own_vocabulary),
            strengths=tuple(value.strength for value in values),
        )


def union(sets: Iterable[Places]) -> Places:
    """All value networks of several sets.

    Example:
        >>> union([(0, 2), (), (1, 2)])
        (0, 1, 2)
    """
    return tuple(sorted({place for places in sets for place in places}))


def _next_own(own: Iterable[OwnVocabulary], network: Network) -> OwnVocabulary | None:
    return next(iter(own), None) if network.mapped else None
