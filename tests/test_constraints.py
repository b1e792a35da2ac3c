"""constraints.txt pins every requirement, for every Python that pyproject.toml names."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

# They need their devices, or compile for minutes: never installed together with the others.
_UNPINNED = {"llama-cpp-python"}


def _requirements(project_root: Path) -> list[Requirement]:
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    return [one for one in found if one.name not in {"ivl_jax", *_UNPINNED}]


def _pins(project_root: Path) -> list[Requirement]:
    lines = (project_root / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def _name(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-")


def test_pins_name_versions_and_no_place(project_root: Path) -> None:
    for pin in _pins(project_root):
        assert pin.url is None
        assert [one.operator for one in pin.specifier] == ["=="], str(pin)
    text = (project_root / "constraints.txt").read_text()
    assert "://" not in text
    assert "\n-" not in text


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_requirement_is_pinned_once_within_its_bounds(
    project_root: Path, python: str
) -> None:
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    environment = {"python_version": python}
    pins: dict[str, str] = {}
    for pin in _pins(project_root):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert _name(pin) not in pins, f"{pin.name} is pinned twice for Python {python}"
            (pins[_name(pin)],) = (one.version for one in pin.specifier)
    for requirement in _requirements(project_root):
        assert _name(requirement) in pins, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(pins[_name(requirement)]), str(requirement)
