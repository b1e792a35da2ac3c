"""Any checkpoint of a run becomes a value folder, and that a Hugging Face folder."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from ivl_jax.checkpoint import (
    NoUsableCheckpointError,
    TrainCheckpointer,
    ValueFolderError,
    export_value,
    load_value,
    write_value_description,
)
from ivl_jax.checkpoint.__main__ import main
from ivl_jax.model.decoder import build_decoder, forward, init_params, stack_layers
from ivl_jax.weights.language_model import load_language_model


class State(NamedTuple):
    """Like the train state: parameters among other things."""

    step: jax.Array
    params: dict[Any, Any]
    opt_state: tuple[dict[Any, Any], ...]
    key: jax.Array


@functools.cache
def params_at(arch: Any, step: int) -> dict[Any, Any]:
    """Give the parameters of the run below at a step, vocabulary rows padded to 320."""
    return init_params(arch, jax.random.key(step), vocab_rows=320)


def make_run(run_dir: Path, arch: Any, metadata: Any, tokenizer: Any, *, stacked: bool) -> None:
    write_value_description(run_dir, metadata=metadata, tokenizer=tokenizer)
    with TrainCheckpointer(run_dir / "checkpoints", keep=5) as checkpointer:
        for step, nll in [(0, 3.0), (10, 1.0), (20, 2.0)]:
            params = params_at(arch, step)
            params = stack_layers(params) if stacked else params
            state = State(jnp.int32(step), params, (params,), jax.random.key(0))
            checkpointer.save(state, data_state=None, run_metadata={}, metrics={"nll": nll})


@pytest.fixture(params=[False, True], ids=["unstacked", "stacked"])
def run_dir(request, tmp_path: Path, arch, metadata, tokenizer) -> Path:
    """A run directory with a description and three checkpoints; step 10 is the best."""
    make_run(tmp_path / "run", arch, metadata, tokenizer, stacked=request.param)
    return tmp_path / "run"


def assert_is_step(folder: Path, arch: Any, step: int) -> None:
    value = load_value(folder)
    assert value.metadata.steps == step
    expected = params_at(arch, step)
    np.testing.assert_array_equal(
        value.params["embed_tokens"]["embedding"],
        expected["embed_tokens"]["embedding"][: arch.vocab_size],
    )
    jax.tree.map(np.testing.assert_array_equal, value.params["layers"], expected["layers"])


def test_best_latest_and_any_step_become_value_folders(run_dir: Path, arch, tmp_path) -> None:
    assert export_value(run_dir, "best", tmp_path / "best") == 10
    assert export_value(run_dir, "latest", tmp_path / "latest") == 20
    assert export_value(run_dir, 0, run_dir / "value") == 0
    assert_is_step(tmp_path / "best", arch, 10)
    assert_is_step(tmp_path / "latest", arch, 20)
    assert_is_step(run_dir / "value", arch, 0)


def test_export_changes_nothing_in_the_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()  # a save of a run still going

    def everything() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}

    before = everything()
    export_value(run_dir, "latest", tmp_path / "out")
    assert everything() == before
    assert (run_dir / "checkpoints" / "30.orbax-checkpoint-tmp").exists()


def test_an_altered_checkpoint_is_never_exported(run_dir: Path, arch, damage, tmp_path) -> None:
    victim = next((run_dir / "checkpoints" / "10" / "state").rglob("d/*"))
    damage(victim, "flip")
    with pytest.raises(NoUsableCheckpointError, match=victim.name):
        export_value(run_dir, "best", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    damage(next((run_dir / "checkpoints" / "20" / "state").rglob("d/*")), "flip")
    with pytest.raises(
        NoUsableCheckpointError, match="is step 0, before any training: there is no"
    ):
        export_value(run_dir, "latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_value(run_dir, 0, tmp_path / "out") == 0
    assert_is_step(tmp_path / "out", arch, 0)


def test_an_untrained_best_checkpoint_is_exported_by_its_number_only(
    tmp_path: Path, arch, metadata, tokenizer
) -> None:
    run_dir = tmp_path / "run"
    write_value_description(run_dir, metadata=metadata, tokenizer=tokenizer)
    with TrainCheckpointer(run_dir / "checkpoints", keep=5) as checkpointer:
        for step, nll in [(0, 1.0), (10, 2.0)]:
            state = State(jnp.int32(step), params_at(arch, step), (), jax.random.key(0))
            checkpointer.save(state, data_state=None, run_metadata={}, metrics={"nll": nll})
    with pytest.raises(NoUsableCheckpointError, match=r"no later one did better.* step 10 with"):
        export_value(run_dir, "best", tmp_path / "out")
    assert export_value(run_dir, 0, tmp_path / "out") == 0


def test_an_altered_description_is_named(run_dir: Path, damage, tmp_path: Path) -> None:
    damage(run_dir / "value_description" / "tokenizer" / "tokenizer.json", "flip")
    with pytest.raises(ValueFolderError, match=r"tokenizer/tokenizer\.json: altered"):
        export_value(run_dir, "latest", tmp_path / "out")


def test_what_cannot_be_exported_says_why(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the directory of a run"):
        export_value(tmp_path, "latest", tmp_path / "out")
    with pytest.raises(NoUsableCheckpointError, match=r"has no step 5; it has \[0, 10, 20\]"):
        export_value(run_dir, 5, tmp_path / "out")
    with pytest.raises(FileExistsError, match="it is not a value folder"):
        export_value(run_dir, 0, run_dir, overwrite=True)
    with pytest.raises(ValueFolderError, match="it only describes a run"):
        load_value(run_dir / "value_description")


def test_without_held_out_figures_no_checkpoint_is_the_best(
    tmp_path: Path, metadata, tokenizer
) -> None:
    write_value_description(tmp_path, metadata=metadata, tokenizer=tokenizer)
    with TrainCheckpointer(tmp_path / "checkpoints", keep=1) as checkpointer:
        state = State(jnp.int32(0), {"a": jnp.zeros(1)}, (), jax.random.key(0))
        checkpointer.save(state, data_state=None, run_metadata={})
    with pytest.raises(NoUsableCheckpointError, match="has a held-out figure"):
        export_value(tmp_path, "best", tmp_path / "out")


def test_commands_export_a_value_folder_and_a_hugging_face_folder(
    run_dir: Path, arch, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "value"
    assert main(["export-value", str(run_dir), str(out), "--step", "best"]) == 0
    assert capsys.readouterr().out == f"step 10 of {run_dir} is in {out}\n"
    assert_is_step(out, arch, 10)
    assert main(["export-hf", str(out), str(tmp_path / "hf")]) == 0
    model = load_language_model(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, model.params, load_value(out).params)
    assert model.stop_ids == (257, 5), "the stop ids are kept"
    capsys.readouterr()
    assert main(["export-value", str(run_dir), str(out)]) == 1
    assert "set overwrite" in capsys.readouterr().err


def test_safetensors_beside_a_value_folder_are_a_plain_model_with_our_logits(
    tmp_path: Path, arch, metadata, tokenizer, capsys
) -> None:
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    run_dir, out, folder = (tmp_path / name for name in ("run", "value", "plain"))
    make_run(run_dir, arch, metadata, tokenizer, stacked=False)
    assert main(["export-value", str(run_dir), str(out), "--safetensors", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, arch.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    graphdef = build_decoder(arch)
    ours = jax.jit(lambda params: forward(graphdef, params, tokens, positions=positions))(
        load_value(out).params
    )
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        theirs = model(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_safetensors_of_a_network_that_reads_the_base_are_refused_before_anything_is_written(
    tmp_path: Path, metadata, tokenizer, capsys
) -> None:
    cascade = dataclasses.replace(metadata, connection="cascade")
    write_value_description(tmp_path / "run", metadata=cascade, tokenizer=tokenizer)
    arguments = ["export-value", str(tmp_path / "run"), str(tmp_path / "value"), "--safetensors"]
    assert main([*arguments, str(tmp_path / "plain")]) == 1
    assert "connection cascade, expected residual" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_step_that_is_not_a_step_is_an_error_of_the_command_line(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["export-value", "run", "out", "--step", "newest"])
    assert "expected a step, best or latest, got 'newest'" in capsys.readouterr().err
