"""Two JAX processes load a checkpoint, each its share, and write it together."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import init_params
from ivl_jax.weights.hf_saving import save_params
from tests.run_two_processes import run_two_processes


@pytest.mark.slow
def test_two_processes_load_their_shares_and_save_the_whole(
    arch: ArchConfig, tmp_path: Path, project_root: Path
) -> None:
    params = init_params(arch, jax.random.key(0))
    save_params(tmp_path / "model", arch, params, dtype=jnp.float32)
    script = project_root / "tests" / "weights" / "two_processes.py"
    run_two_processes(script, tmp_path, project_root=project_root)
