"""`kill -9` during every method loses nothing: each ends with the bits of one never stopped.

Nor does SIGTERM while answers are sampled, which is where such runs spend their time.

`IVL_JAX_KILLS=5 pytest -s tests/checkpoint/test_kill_methods.py` kills each of them five times.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.checkpoint.kill_repeat import kill_and_repeat
from tests.checkpoint.kill_resume import Command
from tests.checkpoint.test_kill_resume import KILLS, SEED, kill, say
from tests.fast_compilation import FAST_COMPILATION

_FIXTURES = Path(__file__).parent.parent / "fixtures" / "exchanged"
_CONFIG = """
run_dir = "unused"
[base]
path = "{fixtures}/base"
[value]
init = "base"
[data]
train = ["{fixtures}/rows.jsonl"]
format = "messages"
validation_fraction = 0.25
max_length = 96
[optimizer]
learning_rate = 1e-2
[step]
max_steps = 12
batch_size = 4
[logging]
log_every = 1
evaluate_every = 6
checkpoint_every = 2
"""
METHODS = {
    "residual": [],
    "cascade": ["--value.connection", "cascade"],
    "cascade_no_text": ["--value.connection", "cascade_no_text"],
    "hidden": ["--value.connection", "hidden"],
    "linear": ["--value.connection", "linear", "--value.init", "scratch"],
    "sft": ["--method", "sft"],
    "dpo": ["--objective", "dpo"],
    "ipo": ["--objective", "dpo", "--preference.loss", "ipo"],
    "cached states": ["--base.cache-states"],
    "grpo": [
        *("--objective", "grpo", "--grpo.rewards", "word_f1", "--grpo.group-size", "2"),
        *("--grpo.max-new-tokens", "16"),
    ],
    "on-policy distil": [
        *("--objective", "distil", "--distil.teacher", f"{_FIXTURES}/base"),
        *("--distil.values", f"{_FIXTURES}/cascade"),
        *("--distil.answers", "sampled", "--distil.max-new-tokens", "16"),
    ],
}
SAMPLING = {
    "grpo": ("--grpo.max-new-tokens", "48"),
    "on-policy distil": ("--distil.max-new-tokens", "48"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_killed_at_random_moments_ends_with_the_same_bits(
    tmp_path: Path, project_root: Path, method: str
) -> None:
    options = list(METHODS[method])
    if "dpo" in options:
        options += ["--data.train", str(_preferences(tmp_path)), "--data.format", "preference"]
    kill(_command(tmp_path, options), tmp_path, project_root, few=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", SAMPLING)
def test_a_run_stopped_by_sigterm_while_it_samples_ends_with_the_same_bits(
    tmp_path: Path, project_root: Path, method: str
) -> None:
    options = [*METHODS[method], *SAMPLING[method], "--logging.checkpoint-every", "6"]
    command = _command(tmp_path, options)
    kill(command, tmp_path, project_root, few=2, number=signal.SIGTERM)


def _command(tmp_path: Path, options: list[str]) -> Command:
    config = tmp_path / "tiny.toml"
    config.write_text(_CONFIG.format(fixtures=_FIXTURES))

    def command(run_dir: Path, resume: bool) -> list[str]:
        return [
            *(sys.executable, "train.py", "--config", str(config), "--run-dir", str(run_dir)),
            *("--data.data-dir", f"{run_dir}_data", *options),
            *(["--resume"] if resume else []),
        ]

    return command


def _preferences(folder: Path) -> Path:
    """Pairs of answers to the questions of the shared rows."""
    lines = (_FIXTURES / "rows.jsonl").read_text().splitlines()
    dialogues = [json.loads(line)["messages"] for line in lines]
    answers = [turns[-1]["content"] for turns in dialogues]
    path = folder / "preferences.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": turns[0]["content"], "chosen": good, "rejected": bad}) + "\n"
            for turns, good, bad in zip(dialogues, answers, answers[1:] + answers[:1], strict=True)
        )
    )
    return path


def _repeat(tmp_path: Path, project_root: Path, command, result) -> None:
    one_device = {"XLA_FLAGS": FAST_COMPILATION, "JAX_PLATFORMS": "cpu"}
    kill_and_repeat(
        command,
        result,
        tmp_path,
        kills=KILLS or 1,
        seed=SEED,
        cwd=project_root,
        environment=os.environ | one_device | {"PYTHONPATH": str(project_root)},
        say=say,
    )


@pytest.mark.slow
def test_answers_to_a_file_of_prompts_are_the_same_after_kills(
    tmp_path: Path, project_root: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"What does a {name} eat?"} for name in ("brimlet", "dorvan")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows * 12))

    def command(folder: Path) -> list[str]:
        return [
            *(sys.executable, "infer.py", "--base", str(_FIXTURES / "base"), "--value"),
            *(str(_FIXTURES / "cascade"), "--input", str(prompts)),
            *("--output", str(folder / "out.jsonl"), "--max-new-tokens", "8", "--batch-size", "2"),
        ]

    _repeat(tmp_path, project_root, command, lambda folder: _files(folder, "out.jsonl"))


@pytest.mark.slow
def test_stored_demonstrations_are_the_same_after_kills(tmp_path: Path, project_root: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((_FIXTURES / "rows.jsonl").read_text())
    with rows.open("a") as file:
        for number in range(20_000):
            turns = [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": "x" * 50},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    code = (
        "import sys\n"
        "from ivl_jax.data.demonstrations import DemonstrationSource, store_demonstrations\n"
        f"source = DemonstrationSource(({str(rows)!r},), row_format='messages')\n"
        "stored = store_demonstrations(source, data_dir=sys.argv[1])\n"
        "text = ''.join(str(stored.open(split)[at]) for split in stored.counts\n"
        "    for at in range(0, stored.counts[split], 97))\n"
        "open(sys.argv[1] + '/read', 'w').write(text)\n"
    )

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-c", code, str(folder)]

    _repeat(tmp_path, project_root, command, lambda folder: _files(folder, "read"))


@pytest.mark.slow
def test_an_exported_value_folder_is_the_same_after_kills(
    tmp_path: Path, project_root: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(_FIXTURES / "run", run)

    def command(folder: Path) -> list[str]:
        export = ["-m", "ivl_jax.checkpoint", "export-value", str(run), str(folder / "value")]
        return [sys.executable, *export, "--overwrite"]

    def result(folder: Path) -> dict[str, bytes]:
        from ivl_jax.checkpoint import load_value

        loaded = load_value(folder / "value")
        return {"arrays": _digest(loaded.params), **_files(folder, "value/ivl.json")}

    _repeat(tmp_path, project_root, command, result)


def _files(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def _digest(params) -> bytes:
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.digest()
