"""What the tests of infer.py share: its flags for stories260k, and a run of it in this process."""

import importlib.util
import logging
import sys

import pytest

from ivl_jax.checkpoint import save_value
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.conftest import make_value


@pytest.fixture(scope="session")
def value_folder(stories260k_dir, tmp_path_factory):
    base = load_language_model(stories260k_dir)
    value = make_value(base)
    folder = tmp_path_factory.mktemp("value") / "value"
    save_value(folder, params=value.params, metadata=value.metadata, tokenizer=value.tokenizer)
    return folder


@pytest.fixture(scope="session")
def module(project_root):
    """infer.py as a module."""
    spec = importlib.util.spec_from_file_location("infer", project_root / "infer.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def infer(module, monkeypatch, capsys, caplog):
    """Runs the command line in this process, on one of its devices: (status, output, messages)."""
    logger = logging.getLogger("ivl_jax")
    level = logger.level

    def run(*flags):
        flags = ["--mesh.tensor", "1", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", ["infer.py", *flags])
        caplog.clear()
        try:
            status = module.main()
        except SystemExit as end:  # tyro's own errors
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err + caplog.text

    yield run
    logger.setLevel(level)


@pytest.fixture(scope="session")
def gpt2_model_dir(gpt2_tokenizer_dir, stories260k_dir, tmp_path_factory):
    """A language model's folder with another tokenizer, as far as it is read before the weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    for path in (*gpt2_tokenizer_dir.iterdir(), stories260k_dir / "config.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def base_flags(stories260k_dir, value_folder):
    return ("--base", stories260k_dir, "--value", value_folder, "--strength", 0.3)


@pytest.fixture
def without_torch(tmp_path):
    """A folder that hides PyTorch, which transformers then advises to install."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *more: name != 'torch' and find(name, *more) or None\n"
    )
    return tmp_path


@pytest.fixture(scope="session")
def mapped_flags(stories260k_dir, tmp_path_factory):
    """stories260k as a value on S, through a map built on the spot."""
    from ivl_jax.assets import family_folder
    from ivl_jax.vocabulary.__main__ import build

    folder = tmp_path_factory.mktemp("map")
    (folder / "text.txt").write_text("Once upon a time there was a girl. She said: return 0\n" * 5)
    sides = {"base_tokenizer": family_folder("S"), "value_tokenizer": stories260k_dir}
    path = folder / "map.safetensors"
    build(**sides, text=(folder / "text.txt",), output=str(path), method="bytes")
    return ("--base", family_folder("S"), "--value", stories260k_dir, "--map", path)
