"""From flags to a composed model; everything is checked before a weight is read.

In: `ModelFlags`. Out: `ModelSources`, which identify the models in reports and in the settings of
files written over several runs; then a `ComposedModel`.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from jax.sharding import Mesh

from ivl_jax.compilation_cache import use_compilation_cache
from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.config import model_problems
from ivl_jax.data.chat import ChatFormat, make_chat_format
from ivl_jax.decoding.loading import decoding_mesh, load_composed, read_sources
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompt_files import folder_fingerprint
from ivl_jax.decoding.prompts import PromptReader, make_prompt_reader
from ivl_jax.evaluation.flags import ModelFlags, require
from ivl_jax.processes import require_one_process


@dataclass(frozen=True)
class ModelSources:
    """Models that have passed every check that does not read weights.

    Attributes:
        flags: The flags that name them.
        models: Base and value networks before their weights, checked against each other.
        prompts: Encodes prompts for them.
        mesh: Where they will live; None: one device.
    """

    flags: ModelFlags
    models: ComposedSources
    prompts: PromptReader = field(repr=False)
    mesh: Mesh | None

    def to_json(self) -> dict[str, Any]:
        """What determines the figures of a run: folders by name and content, strengths, dtype."""
        composed, values, draft = self.flags.composed, self.models.values, self.models.draft
        record = {
            "base": composed.base,
            "value": [value.path for value in values],
            "strength": list(composed.strength or (1.0,) * len(values)),
            "map": [value.described_map and value.described_map.path for value in values],
            "chat_template": self.flags.chat_template,
            "dtype": composed.dtype,
            "int8_base": composed.int8_base,
            "base_fingerprint": folder_fingerprint(self.models.base.folder),
            "value_fingerprints": [folder_fingerprint(value.folder) for value in values],
            "map_fingerprints": [
                hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
                for path in composed.map
                if path != "none"
            ],
        }
        if not composed.policy.is_constant:  # for files from before policies existed
            policy = composed.policy
            record |= {"strength_policy": policy.name, "policy_scale": policy.scale}
        # Recorded only with a draft, so that files from before drafts existed can be resumed.
        if draft is not None:
            record |= {
                "draft": draft.path,
                "draft_length": composed.draft_length,
                "draft_fingerprint": folder_fingerprint(draft.folder),
            }
        elif self.models.ngrams:
            record |= {"draft": composed.draft, "draft_length": composed.draft_length}
        return record


def find_sources(flags: ModelFlags) -> ModelSources:
    """Check flags, folders, tokenizers and connection schemes, without reading a weight.

    Args:
        flags: the flags that name the models.

    Returns:
        The checked models.

    Raises:
        ConfigError: flags are missing or inconsistent, or there are several processes.
        FileNotFoundError: no such base model or value folder.
        ValueError: a value folder or a map has an unknown format version or does not fit the base
            (if a map is needed, the message gives the command that builds it); or the mesh does not
            fit the devices.
    """
    composed = flags.composed
    require(model_problems(composed))
    require_one_process("an evaluation")
    use_compilation_cache(flags.runtime.compilation_cache)
    models = read_sources(composed)
    mesh = decoding_mesh(composed.mesh, models.base.arch)
    return ModelSources(flags, models, make_prompt_reader(models), mesh)


def load_model(sources: ModelSources) -> ComposedModel:
    """Load base and value networks and compose them.

    Args:
        sources: from `find_sources`.

    Returns:
        The composed model, on the mesh of the flags.

    Raises:
        ValueError: the weights do not match the architecture.
    """
    return load_composed(sources.models, sources.flags.composed, mesh=sources.mesh)


def chat_format_of(sources: ModelSources) -> ChatFormat:
    """The chat format of an evaluation: the one in the flags, else the models' own.

    Raises:
        ValueError: no such template.
    """
    template, prompts = sources.flags.chat_template, sources.prompts
    if not template:
        return prompts.chat_format
    return make_chat_format(prompts.base.tokenizer, template=template)
