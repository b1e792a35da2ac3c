"""The import levels of the house: a module imports from lower levels or its own package only."""

import ast
import graphlib
from pathlib import Path

# First match decides; the number is the level.
LEVELS = {
    "ivl_jax.version": -2,
    "ivl_jax.paths": -1,
    "ivl_jax.folder_copies": 0,
    "ivl_jax.text_files": -1,
    "ivl_jax.json_files": 0,
    "ivl_jax.toml_files": 0,
    "ivl_jax.manifest": 1,
    "ivl_jax.config": 0.5,
    "ivl_jax.compilation_cache": 0,
    "ivl_jax.compiled_programs": 0,
    "ivl_jax.processes": 1.1,
    "ivl_jax.command_line": 1,
    "ivl_jax.token_bytes": 0,
    "ivl_jax.buckets": 0,
    "ivl_jax.finite_arrays": 0,
    "ivl_jax.extensions": -2,
    "ivl_jax.profiling": 0,
    "ivl_jax.devices": 0,
    "ivl_jax.target_platform": 0,
    "ivl_jax.file_lock": 1,
    "ivl_jax.model": 1,
    "ivl_jax.tokenizer": 1,
    "ivl_jax.tokenizer_agreement": 1.2,
    "ivl_jax.mesh_sizes": 0,
    "ivl_jax.sharding": 1.5,
    "ivl_jax.tree_compare": 1,
    "ivl_jax.vocabulary.map_checks": 0.5,
    "ivl_jax.vocabulary.mapping": 1,
    "ivl_jax.vocabulary.value_term": 1.5,
    "ivl_jax.vocabulary": 2,
    "ivl_jax.text_codec": 1.5,
    "ivl_jax.composition": 2,
    "ivl_jax.weights": 2,
    "ivl_jax.checkpoint.__main__": 6,  # a command line
    "ivl_jax.checkpoint": 3,
    "ivl_jax.data": 3,
    "ivl_jax.composed": 4,
    "ivl_jax.rewards": 3,
    "ivl_jax.training": 5,
    "ivl_jax.decoding.device": 4.5,
    "ivl_jax.decoding.speculative": 4.7,
    "ivl_jax.decoding": 5,
    "ivl_jax.post_training": 6,
    "ivl_jax.plan.__main__": 7.5,  # a command line
    "ivl_jax.plan": 6,
    "ivl_jax.evaluation": 6,
    "ivl_jax.integrations": 6,
    "ivl_jax.serving": 6,
    "ivl_jax.experiments": 7,
    "ivl_jax.assets": 0,
    "ivl_jax.commands": 7,
    "ivl_jax": 8,
}
FORBIDDEN = {
    "ivl_jax.data": ("ivl_jax.model", "ivl_jax.sharding", "ivl_jax.config"),
    "ivl_jax.model": ("ivl_jax.sharding", "ivl_jax.config", "ivl_jax.data"),
    "ivl_jax.training": ("ivl_jax.decoding",),
    "ivl_jax.decoding": ("ivl_jax.training",),
}


def _package(module: str) -> str:
    return next(name for name in LEVELS if module == name or module.startswith(name + "."))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "ivl_jax":
                found |= {f"ivl_jax.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "ivl_jax"} - {"ivl_jax"}


def violations(root: Path) -> list[str]:
    """Every import in the package that points upwards or is forbidden by name."""
    problems = []
    for path in sorted((root / "ivl_jax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if module == "ivl_jax":
            continue
        package = _package(module)
        for imported in sorted(_imports(path)):
            target = _package(imported)
            same = target == package
            upwards = LEVELS[target] >= LEVELS[package] and not same
            forbidden = target.startswith(FORBIDDEN.get(package, ()) or "\0")
            if upwards or forbidden:
                problems.append(f"{module} imports {imported}")
    return problems


def test_modules_import_only_from_lower_levels(project_root: Path) -> None:
    assert violations(project_root) == []


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    package = tmp_path / "ivl_jax" / "data"
    package.mkdir(parents=True)
    (package / "chat.py").write_text("import ivl_jax.model.decoder\nfrom ivl_jax import training\n")
    assert violations(tmp_path) == [
        "ivl_jax.data.chat imports ivl_jax.model.decoder",
        "ivl_jax.data.chat imports ivl_jax.training",
    ]


def circles(root: Path) -> list[str]:
    """Studies and shared modules of the experiments that import each other in a circle."""
    package = "ivl_jax.experiments"
    imported: dict[str, set[str]] = {}
    for path in sorted((root / package.replace(".", "/")).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names = (name for name in _imports(path) if name.startswith(package + "."))
        imported.setdefault(parts[2], set()).update(name.split(".")[2] for name in names)
    for name, others in imported.items():
        others.discard(name)
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_the_experiments_import_each_other_in_one_direction(
    project_root: Path, tmp_path: Path
) -> None:
    assert circles(project_root) == []
    for study, other in (("one", "two"), ("two", "one")):
        folder = tmp_path / "ivl_jax" / "experiments" / study
        folder.mkdir(parents=True)
        (folder / "lab.py").write_text(f"from ivl_jax.experiments.{other} import lab\n")
    assert set(circles(tmp_path)) == {"one", "two"}


def test_package_files_stay_small(project_root: Path) -> None:
    long = {
        str(path.relative_to(project_root)): lines
        for path in (project_root / "ivl_jax").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, f"one concept a file, 400 lines at most: {long}"
