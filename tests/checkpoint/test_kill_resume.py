"""`kill -9` at any moment loses nothing: resumed runs end with the bits of the one never stopped.

CI kills a few times; the full test, with its transcript on the terminal, is
`IVL_JAX_KILLS=20 pytest -s tests/checkpoint/test_kill_resume.py`.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.checkpoint.kill_resume import kill_and_resume

KILLS = int(os.environ.get("IVL_JAX_KILLS", "4"))


@pytest.fixture
def environment(project_root: Path) -> dict[str, str]:
    """The environment of a training command on one CPU device."""
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(project_root)}


@pytest.mark.slow
def test_a_loop_killed_at_random_moments_ends_with_the_same_bits(
    tmp_path: Path, project_root: Path, environment: dict[str, str]
) -> None:
    script = project_root / "tests" / "checkpoint" / "tiny_training.py"
    during_save = kill_and_resume(
        lambda run_dir, resume: [
            sys.executable,
            str(script),
            str(run_dir),
            *(["--resume"] if resume else []),
        ],
        tmp_path,
        kills=KILLS,
        seed=int(os.environ.get("IVL_JAX_KILL_SEED", "0")),
        cwd=project_root,
        environment=environment,
        say=lambda line: sys.stdout.write(f"{line}\n"),
    )
    assert during_save, "no kill fell into a save: the test did not test what it is for"
