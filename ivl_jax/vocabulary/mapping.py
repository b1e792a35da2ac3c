"""A vocabulary map, which gathers value logits into another vocabulary; and its file.

In: value logits over the value network's tokens, a map. Out: value logits over the base's tokens.
A map is never a dense matrix: each base token takes its logit from at most one value token, or, in
a projection, from at most K of them.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jaxtyping import Array, Bool, Float, Float32, Int32

from ivl_jax.json_files import json_kind, parse_json
from ivl_jax.paths import usable_path, write_atomically
from ivl_jax.text_files import read_bytes
from ivl_jax.vocabulary.map_checks import array_problems, kind_problems

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of a map with one entry per base token."""
PROJECTION_FORMAT_VERSION = 2
"""Of a projection, which earlier versions of ivl_jax cannot apply."""
LOW_COVERAGE = 0.05
"""A map of a smaller share of the base's tokens is warned of, a twentieth: a text of a few pages
covers more."""
BUILD_COMMAND = (
    "python -m ivl_jax.vocabulary build --base-tokenizer {base} --value-tokenizer {value} "
    "--text TEXT --output {output}"
)
_METADATA_KEY = "ivl_jax.vocabulary_map"


class VocabularyMapError(ValueError):
    """A map that cannot be used: which file, what was expected, what was found, the remedy."""


class VocabularyMap(NamedTuple):
    """The value tokens that each base token takes its logit from, and with what weights.

    A projection has K entries per base token, whose weights sum to 1 unless it is unmapped; other
    maps have a single entry, and vectors.
    """

    value_index: Int32[Array, "Vb *K"]
    """Ids of the value tokens; 0 in unused entries."""
    weight: Float32[Array, "Vb *K"]
    """Factors on those tokens' value logits; 0 in unused entries."""


@dataclass(frozen=True)
class MapMetadata:
    """Where a map comes from, stored in its file.

    Attributes:
        method: `dtw`, `bytes` or `projection`.
        base_name: The base tokenizer's name when the map was built.
        base_fingerprint: Fingerprint of the base's ordinary tokens.
        value_name: The value network's tokenizer's name.
        value_fingerprint: Fingerprint of the value network's ordinary tokens.
        value_vocab_size: Number of ids of the value network's tokenizer; every index is below it.
        centred: Whether value logits should be centred before they are mapped.
        token_coverage: Share of base tokens that are mapped, 0 to 1.
        text_coverage: Share of the running text's base tokens that are mapped, 0 to 1.
        texts: Number of texts the map was built from.
        special_pairs: (role, base id, value id) of tokens paired by role.
    """

    method: str
    base_name: str
    base_fingerprint: str
    value_name: str
    value_fingerprint: str
    value_vocab_size: int
    centred: bool
    token_coverage: float
    text_coverage: float
    texts: int
    special_pairs: tuple[tuple[str, int, int], ...]


class DescribedMap(NamedTuple):
    """A map with its metadata and its file."""

    vocabulary_map: VocabularyMap
    """The map."""
    metadata: MapMetadata
    """Where it comes from."""
    path: str
    """Its file, for messages; empty for a map made in memory."""


def apply_vocabulary_map(
    value_logits: Float[Array, "B T Vv"], vocabulary_map: VocabularyMap, *, centred: bool = False
) -> Float32[Array, "B T Vb"]:
    """Map value logits to the base's vocabulary.

    Args:
        value_logits: [B T Vv], any float dtype; mapped in float32. Columns beyond the value
            network's tokenizer are never read.
        vocabulary_map: the map, whose indices are below Vv.
        centred: subtract, per position, the mean of z_value over the value tokens that the map
            uses. A constant added to z_value then changes nothing; without it, such a constant
            lifts or sinks every mapped token against the unmapped ones, whose value logit is 0.

    Returns:
        [B T Vb] in float32: Σ weight · z_value[value_index] over a token's entries, and 0 for
        unmapped tokens. NaN where an index is beyond Vv.

    Source:
        arXiv 2410.21027 and the authors' code, which multiplies by a dense V×V matrix with at most
        one entry per row; the gather gives the same numbers. Centring and projections are ours.

    Example:
        Three base tokens over four value tokens; the second is unmapped.

        >>> import jax.numpy as jnp
        >>> z = jnp.array([[[10.0, 20.0, 30.0, 40.0]]])
        >>> m = VocabularyMap(jnp.array([3, 0, 1]), jnp.array([1.0, 0.0, 0.5]))
        >>> apply_vocabulary_map(z, m).tolist()
        [[[40.0, 0.0, 10.0]]]
        >>> apply_vocabulary_map(z, m, centred=True).tolist()
        [[[10.0, 0.0, -5.0]]]

        A projection: the first base token takes the mean of two value tokens.

        >>> m = VocabularyMap(jnp.array([[3, 0], [1, 0]]), jnp.array([[0.5, 0.5], [1.0, 0.0]]))
        >>> apply_vocabulary_map(z, m).tolist()
        [[[25.0, 20.0]]]
    """
    logits = value_logits.astype(jnp.float32)
    if centred:
        used = _used_value_tokens(vocabulary_map, logits.shape[-1])[None, None, :]
        total = jnp.sum(jnp.where(used, logits, 0.0), axis=-1, keepdims=True)
        logits = logits - total / jnp.maximum(jnp.sum(used, dtype=jnp.float32), 1.0)
    index, weight = vocabulary_map
    if index.ndim == 1:
        return _gather(logits, index, weight)
    # One entry after the other: all at once would need [B T Vb K].
    total = _gather(logits, index[:, 0], weight[:, 0])
    for entry in range(1, index.shape[1]):
        total += _gather(logits, index[:, entry], weight[:, entry])
    return total


def total_weights(vocabulary_map: VocabularyMap) -> np.ndarray:
    """The weights of each base token's entries together.

    Args:
        vocabulary_map: the map.

    Returns:
        [Vb] float32; 0 exactly where the base token is unmapped.
    """
    weight = np.asarray(vocabulary_map.weight)
    return weight if weight.ndim == 1 else weight.sum(axis=1)


def save_vocabulary_map(
    path: epath.PathLike, vocabulary_map: VocabularyMap, metadata: MapMetadata
) -> None:
    """Write a map and its metadata as one safetensors file, atomically replacing an older one.

    Args:
        path: the file; its folder must exist.
        vocabulary_map: the map.
        metadata: where it comes from.
    """
    path = usable_path(path)
    tensors = {
        "value_index": np.asarray(vocabulary_map.value_index, np.int32),
        "weight": np.asarray(vocabulary_map.weight, np.float32),
    }
    is_projection = tensors["weight"].ndim == 2
    version = PROJECTION_FORMAT_VERSION if is_projection else FORMAT_VERSION
    record = {"format_version": version, **dataclasses.asdict(metadata)}
    content = safetensors.numpy.save(tensors, metadata={_METADATA_KEY: json.dumps(record)})
    write_atomically(path, content)


def load_vocabulary_map(path: epath.PathLike) -> tuple[VocabularyMap, MapMetadata]:
    """Read a map and its metadata.

    Args:
        path: a file written by `save_vocabulary_map`.

    Returns:
        The map and its metadata; `check_vocabulary_map` checks whether it fits two tokenizers.

    Raises:
        VocabularyMapError: no such file, not a vocabulary map, another format version, or invalid
            arrays (all problems are listed).
    """
    path = usable_path(path)
    if not path.exists():
        raise VocabularyMapError(
            f"no vocabulary map at {path}; build one: "
            + BUILD_COMMAND.format(base="BASE", value="VALUE/tokenizer", output=path)
        )
    content = read_bytes(path)
    try:
        tensors = safetensors.numpy.load(content)
        record = parse_json(_file_metadata(content)[_METADATA_KEY], _METADATA_KEY)
    # For what it does not expect, such as bytes that are not text, safetensors has many kinds.
    except Exception as error:
        raise VocabularyMapError(
            f"{path} is not a vocabulary map ({type(error).__name__}: {error}); expected a "
            "safetensors file written by python -m ivl_jax.vocabulary build"
        ) from error
    metadata, version = _metadata(path, record)
    problems = array_problems(
        tensors, metadata.value_vocab_size, is_projection=version == PROJECTION_FORMAT_VERSION
    )
    if problems:
        raise VocabularyMapError(
            f"{path}: {'; '.join(problems)}; the file was altered: build the map again"
        )
    if (problem := coverage_problem(metadata)) is not None:
        logger.warning("%s: %s", path, problem)
    arrays = (jnp.asarray(tensors["value_index"]), jnp.asarray(tensors["weight"]))
    return VocabularyMap(*arrays), metadata


def coverage_problem(metadata: MapMetadata) -> str | None:
    """Say that a map covers so few tokens that the value network changes next to nothing.

    Args:
        metadata: of the map.

    Returns:
        A sentence below `LOW_COVERAGE`, else None.
    """
    if metadata.token_coverage >= LOW_COVERAGE:
        return None
    return (
        f"the map covers {metadata.token_coverage:.2%} of the base's tokens (below "
        f"{LOW_COVERAGE:.0%}); every other token keeps the base's logit, so the value network "
        f"hardly speaks: build it from more text than these {metadata.texts:,} texts"
    )


def read_map(path: epath.PathLike) -> DescribedMap:
    """Read a map with its metadata and its path.

    Args:
        path: a file written by `save_vocabulary_map`.

    Returns:
        The map, its metadata and its path.

    Raises:
        VocabularyMapError: as `load_vocabulary_map`.
    """
    return DescribedMap(*load_vocabulary_map(path), str(path))


def check_vocabulary_map(
    metadata: MapMetadata,
    *,
    path: epath.PathLike,
    base_name: str,
    base_fingerprint: str,
    value_name: str,
    value_fingerprint: str,
) -> None:
    """Check that a map was built for these two tokenizers, before any model is loaded.

    Args:
        metadata: of the map.
        path: the map's file, for the message.
        base_name: the base's name in the message and in the command it gives (its folder).
        base_fingerprint: `TokenizerInfo.fingerprint` of the base's tokenizer.
        value_name: the same for the value network.
        value_fingerprint: of the value network's tokenizer.

    Raises:
        VocabularyMapError: the map was built for another base or value tokenizer; the message names
            both, and the command that builds the right map.
    """
    tokenizers = (
        ("base", metadata.base_name, metadata.base_fingerprint, base_name, base_fingerprint),
        ("value", metadata.value_name, metadata.value_fingerprint, value_name, value_fingerprint),
    )
    problems = [
        f"its {role} tokenizer is {built} (fingerprint {expected[:12]}), but {here} has "
        f"fingerprint {found[:12]}"
        for role, built, expected, here, found in tokenizers
        if expected != found
    ]
    if not problems:
        return
    swapped = (base_fingerprint, value_fingerprint) == (
        metadata.value_fingerprint,
        metadata.base_fingerprint,
    )
    hint = "; base and value are swapped" if swapped else ""
    raise VocabularyMapError(
        f"the vocabulary map {path} was built for base {metadata.base_name} and value "
        f"{metadata.value_name}, not for base {base_name} and value {value_name}: "
        f"{'; '.join(problems)}{hint}; build one for them: "
        + BUILD_COMMAND.format(base=base_name, value=value_name, output="MAP.safetensors")
    )


def _gather(
    logits: Float32[Array, "B T Vv"], index: Int32[Array, " Vb"], weight: Float32[Array, " Vb"]
) -> Float32[Array, "B T Vb"]:
    """One entry of each base token."""
    # mode="fill" gives NaN beyond the last column, so that a map for another model does not go
    # unnoticed.
    gathered = jnp.take(logits, index, axis=-1, mode="fill")
    weight = weight[None, None, :]
    return jnp.where(weight != 0, gathered * weight, 0.0)


def _used_value_tokens(vocabulary_map: VocabularyMap, width: int) -> Bool[Array, " Vv"]:
    """Value tokens that at least one base token takes its logit from."""
    used = jnp.zeros((width,), jnp.bool_)
    return used.at[vocabulary_map.value_index].max(vocabulary_map.weight != 0, mode="drop")


def _file_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: an 8-byte length, then a JSON header."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _metadata(path: epath.Path, record: Any) -> tuple[MapMetadata, int]:
    """The metadata, and the version of the format."""
    if not isinstance(record, dict):
        raise VocabularyMapError(
            f"{path}: metadata: expected an object, got {json_kind(record)}; the file was altered: "
            "build it again"
        )
    version = record.pop("format_version", None)
    if version not in (FORMAT_VERSION, PROJECTION_FORMAT_VERSION):
        raise VocabularyMapError(
            f"{path} has vocabulary map format {version}, but this ivl_jax reads {FORMAT_VERSION} "
            f"and {PROJECTION_FORMAT_VERSION}; build the map again, or use the version of ivl_jax "
            "that wrote it"
        )
    expected = {field.name for field in dataclasses.fields(MapMetadata)}
    if set(record) != expected:
        raise VocabularyMapError(
            f"{path}: expected the metadata keys {sorted(expected)}, got {sorted(record)}; "
            "the file was altered: build the map again"
        )
    problems = kind_problems(record)
    if problems:
        raise VocabularyMapError(
            f"{path}: metadata: {'; '.join(problems)}; the file was altered: build it again"
        )
    record["special_pairs"] = tuple((role, b, v) for role, b, v in record["special_pairs"])
    return MapMetadata(**record), version
