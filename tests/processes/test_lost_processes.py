"""train.py as several processes, of which one is killed, stopped, told to stop, or fails."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ivl_jax.config import MeshConfig, ProcessesConfig, config_to_toml
from tests.processes.several import SeveralProcesses
from tests.training.conftest import tiny_config, tiny_pair

__all__ = ["tiny_config", "tiny_pair"]

_TIMEOUT = 5


@pytest.fixture
def start(project_root, tiny_config, tmp_path):
    """Starts the tiny run, with so many steps that it does not end by itself."""

    def start(count, *flags, steps=100_000, devices=1):
        config = replace(
            tiny_config,
            distributed=True,
            step=replace(tiny_config.step, max_steps=steps, micro_batches=1),
            logging=replace(tiny_config.logging, checkpoint_every=5, evaluate_every=0),
            mesh=MeshConfig(data=1, fsdp=-1),
            processes=ProcessesConfig(heartbeat_timeout=_TIMEOUT),
        )
        file = tmp_path / "many.toml"
        file.write_text(config_to_toml(config))
        folder = tmp_path / f"output{len(list(tmp_path.glob('output*')))}"
        arguments = ("--config", str(file), *flags)
        return SeveralProcesses(project_root, folder, *arguments, count=count, devices=devices)

    return start


def last_saved(run_dir):
    return max(int(path.name) for path in Path(run_dir, "checkpoints").glob("[0-9]*"))


def lines_about_the_end(output):
    return [line for line in output.splitlines() if line.startswith("train.py: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "lost", "count"),
    [
        (signal.SIGKILL, 1, 2),
        (signal.SIGKILL, 0, 2),
        (signal.SIGSTOP, 1, 2),
        (signal.SIGSTOP, 0, 2),
        (signal.SIGKILL, 2, 4),
    ],
)
def test_when_one_process_is_killed_or_stopped_the_others_end_with_one_line(
    start, tiny_config, number, lost, count
):
    with start(count) as run:
        run.wait_for("step 12/")
        run.processes[lost].send_signal(number)
        others = [index for index in range(count) if index != lost]
        assert run.finish(*others, seconds=60) == [76] * len(others)
        for index in others:
            (line,) = lines_about_the_end(run.output(index))
            reason = "closed the connection" if lost == 0 else "gave no sign of life"
            assert f"process {lost} " in line
            assert reason in line or number == signal.SIGSTOP
            assert f"process {index} of {count} ends too (status 76)" in line
            assert line.endswith(f"--config {tiny_config.run_dir}/config.toml --resume")
            assert "stack trace" not in run.output(index)
        if number == signal.SIGSTOP:
            run.processes[lost].send_signal(signal.SIGCONT)
            assert run.finish(lost, seconds=60) == [76]
            assert "stack trace" not in run.output(lost)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 3])
def test_sigterm_to_one_of_four_processes_saves_the_same_step_in_all(start, tiny_config, told):
    with start(4) as run:
        run.wait_for("step 7/")
        run.processes[told].send_signal(signal.SIGTERM)
        assert run.finish(seconds=60) == [75] * 4
        stopped = f"after step {last_saved(tiny_config.run_dir)}/"
        assert stopped in run.output(0)


@pytest.mark.slow
def test_a_process_that_fails_alone_says_why_in_all(start, tiny_config):
    with start(2) as run:
        run.wait_for("step 7/")
        # Process 0 alone writes the records; a folder in their place is an error of its own.
        records = Path(tiny_config.run_dir, "metrics.jsonl")
        records.rename(records.with_name("moved"))
        records.mkdir()
        assert run.finish(seconds=60) == [1, 76]
        (line,) = lines_about_the_end(run.output(0))
        assert "Is a directory" in line
        (line,) = lines_about_the_end(run.output(1))
        assert "process 0 " in line
        assert "ended with an error: [Errno 21] Is a directory" in line
        assert "process 1 of 2 ends too (status 76)" in line


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(start, tmp_path):
    records = {}
    for counts in ((2, 4, 1), (1,)):  # of four devices in all
        run_dir = tmp_path / "-".join(map(str, counts))
        for part, count in enumerate(counts):
            flags = ["--run-dir", str(run_dir), "--step.max-steps", "40"]
            flags += ["--processes.heartbeat-timeout", "60"]  # nothing is lost here
            flags += ["--no-distributed"] if count == 1 else []
            flags += ["--resume"] if part else []
            with start(count, *flags, devices=4 // count) as run:
                if part == len(counts) - 1:
                    assert run.finish() == [0] * count, run.output(0)
                else:
                    run.wait_for(f"step {(4, 20)[part]}/")
                    run.processes[-1].send_signal(signal.SIGTERM)
                    assert run.finish() == [75] * count, run.output(0)
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        records[counts] = [json.loads(line) for line in lines]
    resumed, alone = ([one for one in found if "loss" in one] for found in records.values())
    assert [one["step"] for one in resumed] == [one["step"] for one in alone] == [*range(1, 41)]
    # The same rows in every step; collectives add in another order.
    assert [one["real_tokens"] for one in resumed] == [one["real_tokens"] for one in alone]
    losses = [[one["loss"] for one in found] for found in (resumed, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
