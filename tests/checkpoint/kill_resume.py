"""Ends a training command at random moments and checks that resuming loses nothing, bit for bit.

Works for any command that takes a run directory and `--resume` and leaves `checkpoints/` and
`metrics.jsonl` in it: the tiny loop beside this file, and train.py.
"""

import difflib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ivl_jax.checkpoint.arrays import read_host_arrays, stored_leaves
from ivl_jax.checkpoint.steps import find_usable_step
from ivl_jax.manifest import MANIFEST_NAME
from ivl_jax.tree_compare import named_leaves

Command = Callable[[Path, bool], list[str]]  # (run directory, resume) → command line
STOPPED_AND_SAVED = 75  # the exit status after a signal that the run handled


def final_state(run_dir: Path) -> tuple[int, dict[str, bytes]]:
    """Read every array of a run's last checkpoint: label, dotted path → bytes."""
    step, rejected = find_usable_step(run_dir / "checkpoints", None)
    assert not rejected, rejected
    item = run_dir / "checkpoints" / str(step) / "state"
    entries = {name.split(".")[0] for name in stored_leaves(item)}
    arrays = {
        f"{entry}.{name}": np.asarray(leaf).tobytes()
        for entry in sorted(entries)
        for name, leaf in named_leaves(read_host_arrays(item, entry)).items()
    }
    return step, arrays


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Check that two runs ended with the same bits."""
    step, arrays = final_state(run_dir)
    expected_step, expected = final_state(reference)
    assert step == expected_step
    assert sorted(arrays) == sorted(expected)
    differing = [name for name in expected if arrays[name] != expected[name]]
    assert not differing, f"{run_dir} and {reference} differ in {differing}"
    got, wanted = (
        (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        for run in (run_dir, reference)
    )
    difference = "".join(difflib.unified_diff(wanted, got, str(reference), str(run_dir), n=0))
    assert got == wanted, f"metrics.jsonl differs:\n{difference}"
    samples = [run / "samples.jsonl" for run in (run_dir, reference)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text(), "samples.jsonl differs"


def describe(run_dir: Path) -> tuple[str, set[tuple[str, int]]]:
    """Say which steps a killed run left sealed and which not; give name and inode of the latter."""
    directory = run_dir / "checkpoints"
    folders = sorted(directory.iterdir()) if directory.exists() else []
    sealed = [path.name for path in folders if (path / MANIFEST_NAME).exists()]
    unfinished = {(path.name, path.stat().st_ino) for path in folders if path.name not in sealed}
    names = sorted(name for name, _ in unfinished)
    return f"sealed {sealed or 'none'}, unfinished {names or 'none'}", unfinished


def kill_and_resume(
    command: Command,
    workplace: Path,
    *,
    kills: int,
    seed: int,
    cwd: Path,
    environment: dict[str, str],
    say: Callable[[str], None],
    number: signal.Signals = signal.SIGKILL,
) -> int:
    """Kill a command at random moments; compare each run that ends with the reference.

    Half of the kills wait for a save to begin and strike within it; the others strike anywhere
    between start and end. When a run ends, it is compared and a new one begins.

    Args:
        command: makes the command line.
        workplace: folder for the run directories.
        kills: how many times to kill.
        seed: of the moments.
        cwd: working directory of the command.
        environment: environment of the command.
        say: takes the lines of the transcript.
        number: the signal: SIGKILL, or one that the run handles by saving its last whole step.

    Returns:
        How many of the kills left behind an unfinished save, or a half-deleted old one, that was
        not there before.
    """
    chance = random.Random(seed)
    reference = workplace / "never_stopped"
    started = time.monotonic()
    subprocess.run(command(reference, False), check=True, cwd=cwd, env=environment)
    duration = time.monotonic() - started
    say(f"never stopped: {duration:.1f} s, last step {final_state(reference)[0]}")

    killed, during_save, runs, resume = 0, 0, 0, False
    while True:
        run_dir = workplace / f"run{runs}"
        line = command(run_dir, resume)
        at_save = killed == 0 or chance.random() < 0.5
        started = time.monotonic()
        _, before = describe(run_dir)
        log = workplace / f"run{runs}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                line,
                cwd=cwd,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if killed < kills:
            if at_save:
                _wait_for_save(process, run_dir, saves=chance.randrange(1, 5))
                time.sleep(chance.uniform(0, 0.1))
            else:
                _wait(process, chance.uniform(0, duration))
        else:
            process.wait()
        if process.poll() is None:
            os.killpg(process.pid, number)
            status = process.wait()
            # A signal handled before training begins ends the process like any other.
            ended = (-signal.SIGKILL,) if number == signal.SIGKILL else (STOPPED_AND_SAVED, -number)
            if status == 0:
                say("        it ended before the signal was handled")
                assert_same_run(run_dir, reference)
                runs, resume = runs + 1, False
                continue
            assert status in ended, f"status {status}:\n{log.read_text(errors='replace')[-4000:]}"
            killed += 1
            left, unfinished = describe(run_dir)
            hit = not unfinished <= before
            during_save += hit
            say(f"kill {killed:2}: run {runs}, {'in a save' if hit else '':9}: {left}")
            resume = run_dir.exists()
            continue
        text = log.read_text(errors="replace")
        assert process.returncode == 0, f"{line} failed:\n{text[-4000:]}"
        if not resume:  # the machine may have been busier when the reference ran
            duration = min(duration, time.monotonic() - started)
        assert_same_run(run_dir, reference)
        say(f"        run {runs} ended: parameters and metrics.jsonl equal, bit for bit")
        runs, resume = runs + 1, False
        if killed >= kills:
            say(f"{killed} kills, {during_save} of them during a save, {runs} runs, all equal")
            return during_save


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _wait_for_save(process: subprocess.Popen, run_dir: Path, *, saves: int) -> None:
    """Wait until this process begins its n-th save (a temporary folder appears), or ends."""
    seen: set[tuple[str, int]] = set()
    before = {(path.name, path.stat().st_ino) for path in _unfinished(run_dir)}
    while process.poll() is None and len(seen) < saves:
        for path in _unfinished(run_dir):
            try:
                entry = (path.name, path.stat().st_ino)
            except FileNotFoundError:
                continue
            if entry not in before:
                seen.add(entry)
        time.sleep(0.002)


def _unfinished(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
