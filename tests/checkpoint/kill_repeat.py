"""Kills a command that is simply repeated; it must end with the bits of one never killed.

For commands that write a result without checkpoints: they are started again with the same command
line until one run ends by itself.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

Result = Callable[[Path], dict[str, bytes]]  # workplace → name → content of what counts


def kill_and_repeat(
    command: Callable[[Path], list[str]],
    result: Result,
    workplace: Path,
    *,
    kills: int,
    seed: int,
    cwd: Path,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """Kill a command with SIGKILL while it writes, until it ends; compare it with one never killed.

    Args:
        command: Makes the command line, which writes into the folder that it is given.
        result: Reads what must be equal.
        workplace: A folder.
        kills: How many times to kill; after those the command runs to its end.
        seed: Of the moments.
        cwd: Working directory of the command.
        environment: Environment of the command.
        say: Takes the lines of the transcript.
    """
    chance = random.Random(seed)
    reference = workplace / "never_killed"
    reference.mkdir()
    log = workplace / "log"
    with log.open("ab") as output:
        subprocess.run(
            command(reference), check=True, cwd=cwd, env=environment, stdout=output, stderr=output
        )
    expected = result(reference)
    assert expected
    killed, runs = 0, 0
    while True:
        folder = workplace / f"run{runs}"
        folder.mkdir(exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(folder),
                cwd=cwd,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if killed < kills:
            _wait_for_writes(process, folder, count=chance.randrange(1, 4))
            time.sleep(chance.choice((0.0, chance.uniform(0, 0.2))))
        else:
            process.wait()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            left = sorted(path.name for path in folder.rglob("*") if path.is_file())
            say(f"kill {killed:2}: run {runs}: {len(left)} files: {', '.join(left[:4])}")
            continue
        assert process.returncode == 0, log.read_text(errors="replace")[-4000:]
        found = result(folder)
        assert sorted(found) == sorted(expected)
        differing = [name for name in expected if found[name] != expected[name]]
        assert not differing, f"{folder} and {reference} differ in {differing}"
        say(f"        run {runs} ended: equal, bit for bit")
        runs += 1
        if killed >= kills:
            say(f"{killed} kills, {runs} runs, all equal")
            return


def _wait_for_writes(process: subprocess.Popen, folder: Path, *, count: int) -> None:
    """Wait until the command has changed its folder a number of times, or ends."""
    seen, changes = _state(folder), 0
    while process.poll() is None and changes < count:
        time.sleep(0.002)
        now = _state(folder)
        changes += now != seen
        seen = now


def _state(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in folder.rglob("*"):
        try:
            found.add((str(path), path.stat().st_size))
        except FileNotFoundError:
            continue
    return found
