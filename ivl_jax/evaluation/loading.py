"""From flags to a composed model: everything that can be wrong is found before a weight is read.

In: `ModelFlags`. Out: `ModelSources`, which identify the models in reports and beside files that
are written in several runs; then a `ComposedModel`.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from jax.sharding import Mesh

from ivl_jax.composed.compatibility import ComposedSources, check_sources
from ivl_jax.composed.sources import read_language_model, read_values
from ivl_jax.data.chat import ChatFormat, make_chat_format
from ivl_jax.decoding.loading import decoding_mesh, load_composed
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompt_files import folder_fingerprint
from ivl_jax.decoding.prompts import PromptReader, make_prompt_reader
from ivl_jax.evaluation.flags import ModelFlags, check_model_flags, require


@dataclass(frozen=True)
class ModelSources:
    """Folders that have passed every check short of reading weights.

    Attributes:
        flags: What was asked for.
        models: Base and value networks before their weights, checked against each other.
        prompts: How prompts become tokens for them.
        mesh: Where they will live; None: one device.
    """

    flags: ModelFlags
    models: ComposedSources
    prompts: PromptReader = field(repr=False)
    mesh: Mesh | None

    def to_json(self) -> dict[str, Any]:
        """What decides the figures of a run: folders by name and content, strengths, dtype."""
        values = self.models.values
        return {
            "base": self.flags.base,
            "value": [value.path for value in values],
            "strength": list(self.flags.strength or (1.0,) * len(values)),
            "map": [value.described_map and value.described_map.path for value in values],
            "chat_template": self.flags.chat_template,
            "dtype": self.flags.dtype,
            "int8_base": self.flags.int8_base,
            "base_fingerprint": folder_fingerprint(self.models.base.folder),
            "value_fingerprints": [folder_fingerprint(value.folder) for value in values],
            "map_fingerprints": [
                hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
                for path in self.flags.map
                if path != "none"
            ],
        }


def find_sources(flags: ModelFlags) -> ModelSources:
    """Check flags, folders, tokenizers and connection schemes, without reading a weight.

    Args:
        flags: which models.

    Returns:
        Where they are.

    Raises:
        ConfigError: flags that are missing or do not belong together.
        FileNotFoundError: no such base model or value folder.
        ValueError: a value folder or a map of an unknown format version, or one that does not fit
            the base; without a map where one is needed, it gives the command that builds it; or a
            mesh that does not fit the devices.
    """
    require(check_model_flags(flags))
    mesh = decoding_mesh(flags.mesh)
    base = read_language_model(flags.base, role="the base")
    models = check_sources(base, read_values(flags.value, flags.map))
    return ModelSources(flags, models, make_prompt_reader(models), mesh)


def load_model(sources: ModelSources) -> ComposedModel:
    """Load base and value networks and compose them.

    Args:
        sources: of `find_sources`.

    Returns:
        The composed model, on the mesh of the flags.

    Raises:
        ValueError: weights that do not fit.
    """
    flags = sources.flags
    return load_composed(
        sources.models,
        strengths=flags.strength,
        dtype=flags.dtype,
        mesh=sources.mesh,
        base_layout=flags.base_layout,
        value_layout=flags.value_layout,
        int8_base=flags.int8_base,
    )


def chat_format_of(sources: ModelSources) -> ChatFormat:
    """Give the chat format of an evaluation: the one the flags name, else the models' own.

    Raises:
        ValueError: no such template.
    """
    template, prompts = sources.flags.chat_template, sources.prompts
    if not template:
        return prompts.chat_format
    return make_chat_format(prompts.base.tokenizer, template=template)
