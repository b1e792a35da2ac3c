"""Two JAX processes save, fall back, restore and export together."""

from pathlib import Path

import pytest

from tests.run_two_processes import run_two_processes


@pytest.mark.slow
def test_two_processes_agree_on_what_is_saved_and_restored(
    tmp_path: Path, project_root: Path, tokenizer
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = project_root / "tests" / "checkpoint" / "two_processes.py"
    outputs = run_two_processes(script, tmp_path, project_root=project_root)
    for index, output in enumerate(outputs):
        assert f"process {index} stops: no checkpoint" in output
