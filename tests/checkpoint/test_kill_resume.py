"""`kill -9` at any moment loses nothing: resumed runs end with the bits of the one never stopped.

CI kills a few times; the full test, with its transcript on the terminal, is
`IVL_JAX_KILLS=20 pytest -s tests/checkpoint/test_kill_resume.py`.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.checkpoint.kill_resume import Command, kill_and_resume
from tests.fast_compilation import FAST_COMPILATION

KILLS = int(os.environ.get("IVL_JAX_KILLS", "0"))  # 0: a few
SEED = int(os.environ.get("IVL_JAX_KILL_SEED", "0"))


def kill(
    command: Command,
    workplace: Path,
    project_root: Path,
    *,
    few: int,
    number: signal.Signals = signal.SIGKILL,
) -> None:
    """Kill and resume a command, with the transcript on stdout."""
    one_device = {"XLA_FLAGS": FAST_COMPILATION, "JAX_PLATFORMS": "cpu"}
    during_save = kill_and_resume(
        command,
        workplace,
        kills=KILLS or few,
        seed=SEED,
        cwd=project_root,
        environment=os.environ | one_device | {"PYTHONPATH": str(project_root)},
        say=say,
        number=number,
    )
    assert during_save or number != signal.SIGKILL or KILLS < 10, (
        "no kill fell into a save: this did not test what it is for"
    )


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@pytest.mark.slow
def test_a_loop_killed_at_random_moments_ends_with_the_same_bits(
    tmp_path: Path, project_root: Path
) -> None:
    script = project_root / "tests" / "checkpoint" / "tiny_training.py"

    def command(run_dir: Path, resume: bool) -> list[str]:
        return [sys.executable, str(script), str(run_dir), *(["--resume"] if resume else [])]

    kill(command, tmp_path, project_root, few=3)


@pytest.mark.slow
def test_train_killed_at_random_moments_ends_with_the_same_bits(
    tmp_path: Path, project_root: Path
) -> None:
    def command(run_dir: Path, resume: bool) -> list[str]:
        return [
            *(sys.executable, "train.py", "--config", "configs/debug.toml"),
            *("--run-dir", str(run_dir), "--data.data-dir", f"{run_dir}_data"),
            *("--logging.checkpoint-every", "2"),
            *(["--resume"] if resume else []),
        ]

    kill(command, tmp_path, project_root, few=2)
