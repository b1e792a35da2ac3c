"""Whether a value network fits a base: its tokenizer, its vocabulary map, its scheme.

In: the identities of two tokenizers, the connection scheme, optionally a map. Out: the base's ids
that the value network does not know, or an error that names both models and the remedy. Reads no
weights. A draft, which proposes tokens for a base, is checked here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

from ivl_jax.checkpoint.value_tokenizer import TOKENIZER_FOLDER
from ivl_jax.composed.sources import ModelSource
from ivl_jax.composition import ConnectionScheme
from ivl_jax.tokenizer_agreement import TokenizerMismatchError, check_compatible
from ivl_jax.vocabulary.mapping import (
    BUILD_COMMAND,
    VocabularyMapError,
    check_vocabulary_map,
)
from ivl_jax.weights.language_model import check_rows


@dataclass(frozen=True, eq=False)
class ComposedSources:
    """Models that fit each other, before their weights are read; every composed model starts here.

    Attributes:
        base: The base.
        values: The value networks.
        draft: A base that proposes tokens, or None.
        unknown_ids: For each value network, the base ids that it does not know.
        draft_unknown_ids: The same for the draft.
        ngrams: Whether n-grams of the text propose tokens, in place of a draft.
    """

    base: ModelSource
    values: tuple[ModelSource, ...]
    draft: ModelSource | None
    unknown_ids: tuple[tuple[int, ...], ...]
    draft_unknown_ids: tuple[int, ...] = ()
    ngrams: bool = False


def check_sources(
    base: ModelSource,
    values: Sequence[ModelSource],
    *,
    draft: ModelSource | None = None,
    ngrams: bool = False,
) -> ComposedSources:
    """Check tokenizers, vocabulary maps and connection schemes against each other.

    Args:
        base: the base.
        values: the value networks.
        draft: a base that will propose tokens, or None.
        ngrams: whether n-grams of the text will.

    Returns:
        The models, with the base ids that each value network does not know.

    Raises:
        ValueError: as `check_fit` and `check_draft_fit`; or a language model whose tokenizer has
            more ids than its weights have rows.
    """
    unknown = tuple(check_fit(base, value) for value in values)
    if ngrams:
        _check_proposals(base, values, "n-grams as the draft")
    draft_unknown = () if draft is None else check_draft_fit(base, draft, values)
    for source in (base, *values, *([] if draft is None else [draft])):
        if source.metadata is None:
            check_rows(source.path, source.info, source.decoder)
    return ComposedSources(base, tuple(values), draft, unknown, draft_unknown, ngrams)


def check_fit(base: ModelSource, value: ModelSource) -> tuple[int, ...]:
    """Check that a value network can be added to a base.

    Args:
        base: the base.
        value: the value network, with its connection scheme and its vocabulary map, if it has one.

    Returns:
        Base ids that the value network does not know; always empty with a map.

    Raises:
        TokenizerMismatchError: there is no map and the two vocabularies disagree; the message gives
            the command that builds one.
        VocabularyMapError: the map was built for other tokenizers.
        ValueError: the scheme reads the base's logits or hidden states, and the vocabularies or
            widths differ.
    """
    described_map, scheme = value.described_map, value.scheme
    _check_width(base, value)
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
            f"the vocabulary map {described_map.path} refers to value ids up to "
            f"{described_map.metadata.value_vocab_size - 1}, but {value.label} has only "
            f"{value.info.vocab_size} ids: its tokenizer lacks appended tokens that the map uses; "
            f"build the map again: {_build_command(base, value)}"
        )
    if scheme.reads_base:
        raise ValueError(
            f"{value.label} reads {_reads(scheme)} (connection {scheme.name}) over its own "
            f"vocabulary of {value.info.vocab_size} ids, and a vocabulary map cannot give it those "
            f"of {base.label} ({base.info.vocab_size} ids): across vocabularies only the residual "
            "scheme is defined; train the value network with it, or use a base of its own family"
        )
    return ()


def check_draft_fit(
    base: ModelSource, draft: ModelSource, values: Sequence[ModelSource]
) -> tuple[int, ...]:
    """Check that a model can propose tokens for a base under its value networks.

    Args:
        base: the base.
        draft: the model that proposes.
        values: the value networks.

    Returns:
        Base ids that the draft does not know; it never proposes ids beyond its own vocabulary.

    Raises:
        TokenizerMismatchError: base and draft disagree on tokens that both have.
        ValueError: a value network reads base logits.
    """
    _check_proposals(base, values, f"the draft {draft.path}")
    try:
        return check_compatible(
            base.info, draft.info, base_name=base.path, value_name=draft.label
        ).ids
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(
            f"the draft {draft.path} ({_identity(draft)}) does not have the tokenizer of "
            f"{base.label} ({_identity(base)}), so it cannot propose tokens for it: name a smaller "
            "model of the base's own family"
        ) from error


def _check_proposals(base: ModelSource, values: Sequence[ModelSource], draft: str) -> None:
    """Refuse value networks for which several tokens cannot be proposed at once."""
    for value in values:
        scheme = value.scheme
        if scheme.reads_base:
            raise ValueError(
                f"{value.label} reads {_reads(scheme)} (connection {scheme.name}), so its logits "
                f"under {draft} differ from those under the base {base.path}: a "
                "draft works only with value networks that read nothing but the text (residual); "
                "leave the draft out, or train a residual value network"
            )


def tokenizer_folder(value_path: str) -> str:
    """The folder with the tokenizer's files, in a value folder or in a language model's folder."""
    folder = epath.Path(value_path or "VALUE")
    inside = folder / TOKENIZER_FOLDER
    return str(inside if not value_path or inside.exists() else folder)


def _reads(scheme: ConnectionScheme) -> str:
    return "base logits" if scheme.reads_base_logits else "the base's hidden states"


def _check_width(base: ModelSource, value: ModelSource) -> None:
    """A value network that reads hidden states accepts only one width."""
    if not value.scheme.reads_base_hidden:
        return
    expected, found = value.decoder.base_hidden_size, base.decoder.hidden_size
    if expected != found:
        raise ValueError(
            f"{value.label} reads the base's final hidden states (connection {value.scheme.name}) "
            f"and expects width {expected}, but {base.label} has width {found}: use a base of that "
            "width, or train a value network with a scheme that reads only text (residual)"
        )


def _unknown_ids(base: ModelSource, value: ModelSource) -> tuple[int, ...]:
    try:
        return check_compatible(
            base.info, value.info, base_name=base.path, value_name=value.label
        ).ids
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(
            f"{error}. This builds the map:\n  {_build_command(base, value)}\n"
            "Then pass its file along with the value network: --map MAP.safetensors (ivl-serve: "
            "--map NAME=MAP.safetensors)"
        ) from error


def _identity(model: ModelSource) -> str:
    return f"{model.info.vocab_size} ids, fingerprint {model.info.fingerprint[:12]}"


def _build_command(base: ModelSource, value: ModelSource) -> str:
    return BUILD_COMMAND.format(
        base=base.path, value=tokenizer_folder(value.path), output="MAP.safetensors"
    )
