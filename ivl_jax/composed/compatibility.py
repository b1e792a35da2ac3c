"""Whether a value network can go on a base: its tokenizer, its vocabulary map, its scheme.

In: what identifies two tokenizers, the connection scheme, perhaps a map. Out: the base's ids that
the value network does not know, or an error that names both sides and the remedy. Reads no weights.
A draft, which proposes tokens for a base, is checked here too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from ivl_jax.checkpoint.value_folder import TOKENIZER_FOLDER
from ivl_jax.composition import ConnectionScheme
from ivl_jax.tokenizer import TokenizerInfo, TokenizerMismatchError, check_compatible
from ivl_jax.vocabulary.mapping import (
    BUILD_COMMAND,
    DescribedMap,
    VocabularyMapError,
    check_vocabulary_map,
)


class Side(NamedTuple):
    """One of the two networks, as the checks need to know it."""

    name: str
    """What messages call it."""
    path: str
    """Its folder; empty where it was made in memory."""
    info: TokenizerInfo
    """What identifies its tokenizer."""


def check_fit(
    base: Side, value: Side, *, scheme: ConnectionScheme, described_map: DescribedMap | None
) -> tuple[int, ...]:
    """Check that a value network can be added to a base.

    Args:
        base: the base.
        value: the value network.
        scheme: its connection scheme.
        described_map: the map between their vocabularies; None where they share one.

    Returns:
        Base ids that mean something else to the value network, or nothing; none with a map.

    Raises:
        TokenizerMismatchError: without a map, the two vocabularies disagree; the message gives the
            command that builds one.
        VocabularyMapError: the map was built for other tokenizers.
        ValueError: a scheme that reads the base's logits, across vocabularies.
    """
    if described_map is None:
        return _unknown_ids(base, value)
    check_vocabulary_map(
        described_map.metadata,
        path=described_map.path,
        base_name=base.path,
        base_fingerprint=base.info.fingerprint,
        value_name=tokenizer_folder(value.path),
        value_fingerprint=value.info.fingerprint,
    )
    if described_map.metadata.value_vocab_size > value.info.vocab_size:
        raise VocabularyMapError(
            f"the vocabulary map {described_map.path} points at value ids up to "
            f"{described_map.metadata.value_vocab_size - 1}, but {value.name} has only "
            f"{value.info.vocab_size}: its tokenizer lacks appended tokens that the map knows; "
            f"build the map again: {_build_command(base, value)}"
        )
    if scheme.reads_base:
        raise ValueError(
            f"{value.name} reads base logits (connection {scheme.name}) over its own vocabulary of "
            f"{value.info.vocab_size} ids, and a vocabulary map cannot give it those of "
            f"{base.name} ({base.info.vocab_size} ids): across vocabularies only the residual "
            "scheme is defined; train the value network with it, or use a base of its own family"
        )
    return ()


def check_draft_fit(
    base: Side, draft: Side, values: Sequence[tuple[str, ConnectionScheme, DescribedMap | None]]
) -> tuple[int, ...]:
    """Check that a model can propose tokens for a base under its value networks.

    Args:
        base: the base.
        draft: the model that proposes.
        values: name, connection scheme and vocabulary map (or None) of each value network.

    Returns:
        Base ids that mean something else to the draft; it never proposes those beyond its own.

    Raises:
        TokenizerMismatchError: base and draft disagree on tokens both have.
        ValueError: a value network reads base logits, or has its own vocabulary.
    """
    for name, scheme, described_map in values:
        if scheme.reads_base:
            raise ValueError(
                f"{name} reads base logits (connection {scheme.name}): what it says under the "
                f"draft {draft.path} is not what it says under the base {base.path}, and only "
                "value networks that read no more than the text (residual) can be drafted for; "
                "leave the draft out, or train a residual one"
            )
        if described_map is not None:
            raise ValueError(
                f"{name} has its own vocabulary (the map {described_map.path}) and is read token "
                f"by token on the host: the draft {draft.path} cannot propose for it; leave the "
                "draft out"
            )
    try:
        return check_compatible(
            base.info, draft.info, base_name=base.path, value_name=draft.name
        ).ids
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(
            f"the draft {draft.path} ({_identity(draft)}) does not have the tokenizer of "
            f"{base.name} ({_identity(base)}), so it cannot propose tokens for it: name a smaller "
            "model of the base's own family"
        ) from error


def tokenizer_folder(value_path: str) -> str:
    """The folder with the tokenizer's files, of a value folder or of a language model's."""
    folder = epath.Path(value_path or "VALUE")
    inside = folder / TOKENIZER_FOLDER
    return str(inside if not value_path or inside.exists() else folder)


def _unknown_ids(base: Side, value: Side) -> tuple[int, ...]:
    try:
        return check_compatible(
            base.info, value.info, base_name=base.path, value_name=value.name
        ).ids
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(
            f"{error}. This builds the map:\n  {_build_command(base, value)}\n"
            "and its file goes with the value network (infer.py: --map MAP.safetensors)"
        ) from error


def _identity(side: Side) -> str:
    return f"{side.info.vocab_size} ids, fingerprint {side.info.fingerprint[:12]}"


def _build_command(base: Side, value: Side) -> str:
    return BUILD_COMMAND.format(
        base=base.path, value=tokenizer_folder(value.path), output="MAP.safetensors"
    )
