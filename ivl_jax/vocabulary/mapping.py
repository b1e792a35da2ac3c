"""A vocabulary map, which gathers value logits into another vocabulary; and its file.

In: value logits over the value network's tokens, a map. Out: value logits over the base's tokens.
A map is two vectors, never a matrix: each base token takes its logit from at most one value token.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
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

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
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
    """The value token that each base token takes its logit from, and with what weight."""

    value_index: Int32[Array, " Vb"]
    """Id of the value token; 0 where the base token is unmapped."""
    weight: Float32[Array, " Vb"]
    """Factor on that token's value logit; 0 where the base token is unmapped."""


@dataclass(frozen=True)
class MapMetadata:
    """Where a map comes from, stored in its file.

    Attributes:
        method: `dtw` or `bytes`.
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
        [B T Vb] in float32: weight · z_value[value_index], and 0 for unmapped tokens. NaN where
        an index is beyond Vv.

    Source:
        arXiv 2410.21027 and the authors' code, which multiplies by a dense V×V matrix with at most
        one entry per row; the gather gives the same numbers. Centring is ours.

    Example:
        Three base tokens over four value tokens; the second is unmapped.

        >>> import jax.numpy as jnp
        >>> z = jnp.array([[[10.0, 20.0, 30.0, 40.0]]])
        >>> m = VocabularyMap(jnp.array([3, 0, 1]), jnp.array([1.0, 0.0, 0.5]))
        >>> apply_vocabulary_map(z, m).tolist()
        [[[40.0, 0.0, 10.0]]]
        >>> apply_vocabulary_map(z, m, centred=True).tolist()
        [[[10.0, 0.0, -5.0]]]
    """
    logits = value_logits.astype(jnp.float32)
    mapped = vocabulary_map.weight != 0
    if centred:
        used = _used_value_tokens(vocabulary_map, logits.shape[-1])[None, None, :]
        total = jnp.sum(jnp.where(used, logits, 0.0), axis=-1, keepdims=True)
        logits = logits - total / jnp.maximum(jnp.sum(used, dtype=jnp.float32), 1.0)
    # mode="fill" gives NaN beyond the last column, so that a map for another model does not go
    # unnoticed.
    gathered = jnp.take(logits, vocabulary_map.value_index, axis=-1, mode="fill")
    weighted = gathered * vocabulary_map.weight[None, None, :]
    return jnp.where(mapped[None, None, :], weighted, 0.0)


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
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(metadata)}
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
            + BUILD_COMMAND.format(base="BASE", value="VALUE", output=path)
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
    metadata = _metadata(path, record)
    problems = _array_problems(tensors, metadata.value_vocab_size)
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


def _used_value_tokens(vocabulary_map: VocabularyMap, width: int) -> Bool[Array, " Vv"]:
    """Value tokens that at least one base token takes its logit from."""
    used = jnp.zeros((width,), jnp.bool_)
    return used.at[vocabulary_map.value_index].max(vocabulary_map.weight != 0, mode="drop")


def _file_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: an 8-byte length, then a JSON header."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _metadata(path: epath.Path, record: Any) -> MapMetadata:
    if not isinstance(record, dict):
        raise VocabularyMapError(
            f"{path}: metadata: expected an object, got {json_kind(record)}; the file was altered: "
            "build it again"
        )
    version = record.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise VocabularyMapError(
            f"{path} has vocabulary map format {version}, but this ivl_jax reads {FORMAT_VERSION}; "
            "build the map again, or use the version of ivl_jax that wrote it"
        )
    expected = {field.name for field in dataclasses.fields(MapMetadata)}
    if set(record) != expected:
        raise VocabularyMapError(
            f"{path}: expected the metadata keys {sorted(expected)}, got {sorted(record)}; "
            "the file was altered: build the map again"
        )
    problems = [
        f"{name}: expected {expected}, got {json_kind(record[name])}"
        for name, (expected, is_kind) in _KINDS.items()
        if not is_kind(record[name])
    ]
    if problems:
        raise VocabularyMapError(
            f"{path}: metadata: {'; '.join(problems)}; the file was altered: build it again"
        )
    record["special_pairs"] = tuple((role, b, v) for role, b, v in record["special_pairs"])
    return MapMetadata(**record)


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 3
        and isinstance(pair[0], str)
        and all(_is_count(one) for one in pair[1:])
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


_TEXT = ("text", lambda value: isinstance(value, str))
_COUNT = ("a count", _is_count)
_SHARE = ("a share", lambda value: type(value) in (int, float) and 0 <= value <= 1)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("method", "base_name", "base_fingerprint"), _TEXT),
    **dict.fromkeys(("value_name", "value_fingerprint"), _TEXT),
    **dict.fromkeys(("value_vocab_size", "texts"), _COUNT),
    **dict.fromkeys(("token_coverage", "text_coverage"), _SHARE),
    "centred": ("true or false", lambda value: isinstance(value, bool)),
    "special_pairs": (
        "a list of role, base id and value id",
        lambda value: isinstance(value, list) and all(map(_is_pair, value)),
    ),
}


def _array_problems(tensors: dict[str, np.ndarray], value_vocab_size: int) -> list[str]:
    """Everything that is wrong with the arrays of a map's file."""
    expected = {"value_index": np.dtype(np.int32), "weight": np.dtype(np.float32)}
    if set(tensors) != set(expected):
        return [f"expected the tensors {sorted(expected)}, got {sorted(tensors)}"]
    problems = [
        f"{name}: expected a vector of {dtype}, got {tensors[name].dtype} {tensors[name].shape}"
        for name, dtype in expected.items()
        if tensors[name].dtype != dtype or tensors[name].ndim != 1
    ]
    if problems:
        return problems
    index, weight = tensors["value_index"], tensors["weight"]
    if index.shape != weight.shape:
        problems.append(f"value_index has {index.shape[0]} rows, weight {weight.shape[0]}")
    if index.size and (index.min() < 0 or index.max() >= value_vocab_size):
        problems.append(
            f"value_index runs from {index.min()} to {index.max()}, but the value network's "
            f"tokenizer has the ids 0 to {value_vocab_size - 1}"
        )
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        problems.append("weight has entries that are negative or not finite")
    return problems
