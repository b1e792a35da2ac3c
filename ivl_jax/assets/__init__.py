"""Where the models that ship with the package lie."""

from pathlib import Path
from typing import Literal


def family_folder(name: Literal["S", "L", "X"]) -> Path:
    """The Hugging Face folder of a model of the embedded family: S and L share a tokenizer."""
    return Path(__file__).parent / "family" / name
