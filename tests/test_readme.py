"""Every command of README, guides and configs can be given: targets, flags and files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ivl_jax.command_line.flags import parse_flags
from ivl_jax.commands.train import read_flags
from ivl_jax.config import InferConfig

_ROOT = Path(__file__).parents[1]
_GUIDES = ("quick_start", "training", "recipes", "decoding", "evaluation", "results")
_PAGES = (_ROOT / "README.md", *(_ROOT / "docs" / f"{name}.md" for name in _GUIDES))
_COMMAND = re.compile(r"(?:python|make) [^`#|\n]+")


def _commands() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in _PAGES).replace("\\\n", " ")
    commands = [found.strip() for found in _COMMAND.findall(text)]
    configs = sorted((_ROOT / "configs").glob("*.toml"))
    first_lines = [file.read_text(encoding="utf-8").splitlines()[0] for file in configs]
    commands += [line.removeprefix("# ") for line in first_lines]
    # "Python ≥ 3.11 and make are enough" is prose.
    return [command for command in dict.fromkeys(commands) if not command.startswith("make are")]


def _arguments(command: str) -> list[str]:
    """The words of a command; an ellipsis stands for something the reader has."""
    return [word.replace("…", "mine") for word in shlex.split(command)]


def _parse_train(arguments: list[str]) -> None:
    read_flags(arguments)


def _parse_infer(arguments: list[str]) -> None:
    parse_flags(InferConfig, arguments, prog="infer.py")


def _check_make(arguments: list[str]) -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        name, assigned, _ = argument.partition("=")
        form = rf"^{re.escape(name)} \?=" if assigned else rf"^{re.escape(name)}:"
        assert re.search(form, makefile, re.MULTILINE), argument


def _check_module(arguments: list[str]) -> None:
    """The module's help names every flag of the command."""
    module, *rest = arguments
    words = [word for word in rest if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
    commands = words[:1] if rest and rest[0] in words else []
    shown = subprocess.run(
        [sys.executable, "-m", module, *commands, "--help"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    for word in rest:
        if word.startswith("--"):
            assert word in shown.stdout, f"{module} has no {word}"


@pytest.mark.parametrize("command", _commands())
def test_command_can_be_given(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_ROOT)
    program, *arguments = _arguments(command)
    if program == "make":
        _check_make(arguments)
    elif arguments[0] == "-m":
        _check_module(arguments[1:])
    else:
        {"train.py": _parse_train, "infer.py": _parse_infer}[arguments[0]](arguments[1:])


def test_commands_are_found() -> None:
    programs = {" ".join(_arguments(command)[:2]) for command in _commands()}
    assert {"make demo", "make test", "python train.py", "python infer.py"} <= programs


def test_data_sets_that_the_guide_names_are_in_the_installed_catalogue() -> None:
    import tensorflow_datasets as tfds

    text = (_ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    names = re.findall(r"`tfds:(\w+)`", text)
    assert names
    assert set(names) <= set(tfds.list_builders(with_community_datasets=False))


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\((?!https:)([^)#]+)", text)
    assert len(links) > 20
    assert [link for link in links if not (_ROOT / link).exists()] == []
    for objective in ("DPO", "GRPO", "distillation", "LoRA values"):
        assert f"[{objective}](docs/" in text
