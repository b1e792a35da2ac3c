"""Exports a value network as a Hugging Face model folder, for programs without this package.

In: a value folder. Out: a folder that `transformers` loads: weights, configuration, tokenizer with
chat template, stop ids. Its logits are z_value; the caller adds them to a base's
(`ivl_jax.integrations.transformers`).
"""

from pathlib import Path
from typing import Literal

from etils import epath

from ivl_jax.checkpoint.value_folder import ValueNetwork
from ivl_jax.checkpoint.value_metadata import read_value_metadata
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.weights.hf_folder import check_new_folder
from ivl_jax.weights.language_model import LanguageModel, save_language_model


def check_exportable(value: epath.PathLike, out: Path, *, overwrite: bool) -> None:
    """Check everything that can be checked without reading an array.

    Args:
        value: the value folder.
        out: the Hugging Face folder to create.
        overwrite: replace an existing model folder.

    Raises:
        FileNotFoundError: `value` is not a value folder.
        FileExistsError: `out` exists and may not be replaced.
        ValueFolderError: an unknown format version, or invalid entries.
        ValueError: the network reads more than text, or its head several depths.
    """
    metadata = read_value_metadata(value)
    connection, depths = metadata.connection, metadata.architecture.get("head_depths", 1)
    if connection != "residual":
        raise ValueError(
            f"{value}: connection {connection}, expected residual: this network reads the base's "
            "predictions at every position, but a Hugging Face model reads only text (a "
            "LogitsProcessor sees only the base's logits at the last position, not those of the "
            "prompt). Decode it with infer.py, or train a residual value network"
        )
    if depths != 1:
        raise ValueError(
            f"{value}: its head reads a mixture of the last {depths} layers (value.depths), which "
            "no model of transformers computes. Decode it with infer.py, or train with "
            "value.depths = 1"
        )
    check_new_folder(out, overwrite=overwrite)


def export_hugging_face(
    value: ValueNetwork,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"],
    chat_template: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a residual value network as a Hugging Face folder, which appears once complete.

    Args:
        value: the network, layers unstacked; vocabulary rows may be padded.
        out: the folder to create.
        dtype: of every tensor written.
        chat_template: Jinja text for `tokenizer_config.json`; None keeps the tokenizer's own.
        overwrite: replace an existing model folder.

    Raises:
        FileExistsError: `out` exists and may not be replaced.
        ValueError: the network is not a decoder that transformers has.
    """
    if not isinstance(value.arch, ArchConfig):
        raise ValueError(f"{value.path}: expected a decoder, got a linear map on base logits")
    if value.arch != value.arch.plain:
        raise ValueError(
            f"{value.path}: base_hidden_size = {value.arch.base_hidden_size} and head_depths = "
            f"{value.arch.head_depths} are not parts of a transformers model, expected 0 and 1"
        )
    model = LanguageModel(
        path=value.path,
        arch=value.arch,
        params=value.params,
        tokenizer=value.tokenizer,
        tokenizer_info=value.tokenizer_info,
        stop_ids=value.stop_ids,
    )
    save_language_model(out, model, dtype=dtype, chat_template=chat_template, overwrite=overwrite)
