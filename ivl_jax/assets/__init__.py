"""Where the models and configs that ship with the package lie."""

from pathlib import Path
from typing import Literal


def family_folder(name: Literal["S", "L", "X"]) -> Path:
    """The Hugging Face folder of a model of the embedded family: S and L share a tokenizer."""
    return Path(__file__).parent / "family" / name


def config_file(name: str) -> Path:
    """A config of the project: in a clone that of `configs/`, else the copy that a wheel installs.

    Args:
        name: of the file, `demo.toml` for instance.
    """
    installed = Path(__file__).parent / "configs"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "configs"
    return folder / name
