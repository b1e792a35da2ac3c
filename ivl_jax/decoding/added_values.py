"""Value networks that are added to a base that decodes already: checked, measured, loaded.

In: the folder of a value network, perhaps with a vocabulary map. Out: an `EngineValue`, made as the
ones that the engine began with. Nothing here touches an engine: it may run in any thread.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.checkpoint.value_metadata import METADATA_NAME, read_value_metadata
from ivl_jax.composed.compatibility import ComposedSources, check_sources
from ivl_jax.composed.kernel_form import loading_form, network_shapes
from ivl_jax.composed.network import Layout
from ivl_jax.composed.sources import ModelSource, load_schemes, read_value
from ivl_jax.config import ComposedModelConfig
from ivl_jax.decoding.compose import arrange_value
from ivl_jax.decoding.engine_model import EngineValue
from ivl_jax.decoding.loading import in_decoding_form
from ivl_jax.decoding.own_vocabulary import OwnVocabulary
from ivl_jax.decoding.prompts import read_own_vocabulary
from ivl_jax.model.decoder import untie_head
from ivl_jax.model.network import abstract_network
from ivl_jax.sharding import LAYOUTS
from ivl_jax.text_codec import TextCodec
from ivl_jax.vocabulary.mapping import read_map


class CheckedValue(NamedTuple):
    """A value network that fits the base; no weight has been read."""

    source: ModelSource
    unknown_ids: tuple[int, ...]
    """Base ids that it does not know."""


class ValueLoader:
    """Loads value networks for a base.

    Args:
        sources: the models that were composed at first; of them the base and the draft count.
        config: how arrays are held, and which connection schemes and models of adapters are
            trusted.
        mesh: where the base decodes; None: one device.
    """

    def __init__(
        self, sources: ComposedSources, config: ComposedModelConfig, *, mesh: Mesh | None
    ) -> None:
        # The other value networks would be held for as long as the server runs.
        self._sources = dataclasses.replace(sources, values=(), unknown_ids=())
        self._config, self._mesh = config, mesh
        self._schemes = load_schemes(config.connection)
        self._rules, self._dtype = LAYOUTS[config.value_layout], jnp.dtype(config.dtype)

    @property
    def sources(self) -> ComposedSources:
        """The base and the draft."""
        return self._sources

    def check(self, folder: Path, map_file: Path | None, *, name: str) -> CheckedValue:
        """Read everything but the weights, and check it against the base.

        Args:
            folder: a value folder, or a language model's.
            map_file: the vocabulary map between the base's tokenizer and its own, or None.
            name: what messages call it.

        Returns:
            The value network.

        Raises:
            FileNotFoundError: neither of these.
            ValueError: it is damaged or does not fit the base; or it is an adapter, and no
                --value-model says which folder of its model may be read.
        """
        if (folder / METADATA_NAME).exists():
            adapter = read_value_metadata(folder).adapter
            if adapter is not None and not self._config.value_model:
                raise ValueError(
                    f"{name} holds only an adapter of {adapter['model']['name']}, and a value "
                    "folder never says what the server reads: start it with --value-model, the "
                    "folder of that model"
                )
        source = read_value(str(folder), schemes=self._schemes, models=self._config.value_model)
        described_map = None if map_file is None else read_map(map_file)
        source = dataclasses.replace(source, label=name, described_map=described_map)
        base = self._sources
        checked = check_sources(base.base, [source], draft=base.draft, ngrams=base.ngrams)
        return CheckedValue(source, checked.unknown_ids[0])

    def own_vocabulary(self, value: CheckedValue) -> OwnVocabulary | None:
        """How it reads text; None where it shares the base's vocabulary.

        It uses the base's tokenizer, which is not safe in several threads at once.
        """
        base = self._sources.base
        return read_own_vocabulary(TextCodec(base.tokenizer, base.info), value.source)

    def device_bytes(self, value: CheckedValue) -> int:
        """Bytes that its parameters take on each device once it is loaded."""
        arch = value.source.arch
        if self._mesh is not None:
            layout = Layout(self._mesh, self._rules)
            return bytes_on_device(network_shapes(arch, layout, dtype=self._dtype)[1])
        shapes = abstract_network(arch, param_dtype=self._dtype)
        if not loading_form(None).rows:  # a tied head is stored apart
            shapes = jax.eval_shape(untie_head, shapes)
        return bytes_on_device(shapes)

    def load(
        self, value: CheckedValue, own_vocabulary: OwnVocabulary | None, *, strength: float
    ) -> EngineValue:
        """Read the weights.

        Args:
            value: of `check`.
            own_vocabulary: of it.
            strength: α where a prompt names none.

        Returns:
            What the engine adds.

        Raises:
            ValueError: the weights do not match the architecture.
        """
        source, mesh = value.source, self._mesh
        loaded = source.load(
            param_dtype=self._dtype,
            form=loading_form(mesh),
            mesh=mesh,
            sharding_rules=self._rules,
        )
        layout = None if mesh is None else Layout(mesh, self._rules)
        loaded = in_decoding_form(loaded, mesh)
        network, arrays = arrange_value(loaded, source, value.unknown_ids, layout=layout)
        jax.block_until_ready(arrays.params)
        return EngineValue(network, arrays, source.label, own_vocabulary, strength)


def bytes_on_device(tree: Any) -> int:
    """Bytes that arrays, or their shapes, take on each of their devices."""

    def held(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(held, jax.tree.leaves(tree)))
