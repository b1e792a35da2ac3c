"""The tokenizer's files inside a value folder, wherever that folder is.

In: a tokenizer, or a folder that holds one. Out: its files there, or the tokenizer. transformers
reads and writes local folders only.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from ivl_jax.paths import is_local
from ivl_jax.tokenizer import load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any  # importing transformers takes a second

TOKENIZER_FOLDER = "tokenizer"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: epath.Path) -> None:
    """Write a tokenizer's files into a folder that is made.

    Args:
        tokenizer: of the value network.
        folder: local or a URL that `etils.epath` writes.
    """
    folder.mkdir()
    with tempfile.TemporaryDirectory() as local:
        save_tokenizer(tokenizer, local)
        for path in Path(local).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


def read_tokenizer(folder: epath.Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        folder: local or a URL that `etils.epath` reads.

    Returns:
        The tokenizer.
    """
    if is_local(folder):
        return load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as local:
        for path in folder.iterdir():
            (Path(local) / path.name).write_bytes(path.read_bytes())
        return load_tokenizer(local)
