"""The value folder stands alone, comes back exactly, and says what is wrong before any compute."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from ivl_jax.checkpoint import (
    ValueFolderError,
    load_value,
    read_value_metadata,
    save_value,
)
from ivl_jax.manifest import MANIFEST_NAME, write_manifest
from ivl_jax.model.decoder import build_decoder, forward, init_params, stack_layers
from ivl_jax.sharding import bytes_per_device, make_mesh
from ivl_jax.tree_compare import TreeMismatchError
from tests.checkpoint.conftest import VOCAB_SIZE, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path, params, metadata, tokenizer) -> Path:
    """A value folder as `save_value` writes it."""
    path = tmp_path / "value"
    save_value(path, params=params, metadata=metadata, tokenizer=tokenizer)
    return path


@pytest.fixture
def no_arrays_read(monkeypatch) -> None:
    """Make reading an array fail the test."""
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler, "restore", lambda *_, **__: pytest.fail("arrays were read")
    )


def assert_equal(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_value_network_comes_back_exactly(folder, params, metadata, arch, tokenizer) -> None:
    value = load_value(folder)
    assert_equal(value.params, params)
    assert value.metadata == metadata == read_value_metadata(folder)
    assert value.arch == arch
    assert value.connection == "residual"
    assert value.chat_template == metadata.chat_template
    assert value.stop_ids == (257, 5)
    assert value.tokenizer_info.eos_ids == (257, 5)
    assert value.tokenizer_info.ordinary_tokens, "the bytes of each token, for messages"
    assert value.tokenizer("née").input_ids == tokenizer("née").input_ids


def test_the_folder_stands_alone(folder: Path, tmp_path: Path, params) -> None:
    moved = tmp_path / "elsewhere" / "mine"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    assert_equal(load_value(moved).params, params)


def test_plain_orbax_reads_the_arrays(folder: Path, params) -> None:
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(folder / "params")
    kernel = tree["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, params["layers"][1]["mlp"]["up_proj"]["kernel"])


def test_the_metadata_says_what_the_design_lists(folder: Path) -> None:
    content = json.loads((folder / "ivl.json").read_text())
    assert content["format_version"] == 2
    assert content["training_base"] == {"name": "some/base", "fingerprint": "abc"}
    assert content["steps"] == 12
    assert content["stop_ids"] == [257, 5]
    assert content["tokenizer"]["fingerprint"]
    assert {"jax", "flax", "orbax-checkpoint", "python"} <= set(content["library_versions"])
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "ivl.json",
        MANIFEST_NAME,
        "params",
        "tokenizer",
    ]


def test_parameters_are_rounded_to_the_dtype_asked_for(folder: Path, params) -> None:
    got = load_value(folder, param_dtype=jnp.bfloat16).params
    assert_equal(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_bfloat16_parameters_are_stored_as_they_are(tmp_path, arch, metadata, tokenizer) -> None:
    half = init_params(arch, jax.random.key(3), param_dtype=jnp.bfloat16)
    save_value(tmp_path / "v", params=half, metadata=metadata, tokenizer=tokenizer)
    assert_equal(load_value(tmp_path / "v", param_dtype=jnp.bfloat16).params, half)
    assert_equal(
        load_value(tmp_path / "v").params, jax.tree.map(lambda x: x.astype(jnp.float32), half)
    )


def test_stacked_layers_and_padded_rows_are_stored_in_the_one_form(
    tmp_path: Path, folder: Path, arch, params, metadata, tokenizer
) -> None:
    padded = init_params(arch, jax.random.key(1), vocab_rows=320)
    padded["embed_tokens"]["embedding"] = (
        padded["embed_tokens"]["embedding"].at[:VOCAB_SIZE].set(params["embed_tokens"]["embedding"])
    )
    padded["lm_head"]["kernel"] = (
        padded["lm_head"]["kernel"].at[:, :VOCAB_SIZE].set(params["lm_head"]["kernel"])
    )
    other = tmp_path / "other"
    save_value(other, params=stack_layers(padded), metadata=metadata, tokenizer=tokenizer)
    expected = init_params(arch, jax.random.key(1), vocab_rows=320)["layers"]
    got = load_value(other).params
    assert_equal(got["embed_tokens"], params["embed_tokens"])
    assert_equal(got["lm_head"], params["lm_head"])
    assert_equal(got["layers"], expected)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"tensor": 8}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_on_a_mesh_each_device_holds_its_share_and_the_logits_are_equal(
    folder: Path, arch, params, sizes
) -> None:
    mesh = make_mesh(**sizes)
    value = load_value(folder, mesh=mesh)
    embedding = value.params["embed_tokens"]["embedding"]
    assert embedding.shape == (320, 32)
    np.testing.assert_array_equal(embedding[:VOCAB_SIZE], params["embed_tokens"]["embedding"])
    assert not np.any(embedding[VOCAB_SIZE:])
    assert not np.any(value.params["lm_head"]["kernel"][:, VOCAB_SIZE:])
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(value.params))
    held = bytes_per_device(value.params)
    assert len(held) == 8
    assert max(held.values()) < total / (8 // sizes.get("data", 1)) * 1.1
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    graphdef = build_decoder(arch)
    got = jax.jit(forward, static_argnums=0)(graphdef, value.params, tokens, positions=positions)
    expected = forward(graphdef, params, tokens, positions=positions)
    np.testing.assert_allclose(got[..., :VOCAB_SIZE], expected, rtol=1e-5, atol=1e-5)


def test_a_value_network_saved_from_a_mesh_is_the_same_folder(
    tmp_path: Path, folder: Path, metadata, tokenizer, params
) -> None:
    sharded = load_value(folder, mesh=make_mesh(fsdp=2, tensor=4)).params
    save_value(tmp_path / "again", params=sharded, metadata=metadata, tokenizer=tokenizer)
    assert_equal(load_value(tmp_path / "again").params, params)


def test_etils_paths_are_taken_like_strings(tmp_path, params, metadata, tokenizer) -> None:
    where = epath.Path(tmp_path) / "v"
    save_value(where, params=params, metadata=metadata, tokenizer=tokenizer)
    assert_equal(load_value(str(where)).params, params)


def test_relative_paths_are_taken(tmp_path, params, metadata, tokenizer, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_value("runs/value", params=params, metadata=metadata, tokenizer=tokenizer)
    assert_equal(load_value("runs/value").params, params)


# Overwriting, atomicity


def test_an_existing_folder_is_replaced_only_when_asked(
    folder: Path, params, metadata, tokenizer
) -> None:
    before = contents(folder)
    with pytest.raises(FileExistsError, match="set overwrite, or choose another folder"):
        save_value(folder, params=params, metadata=metadata, tokenizer=tokenizer)
    assert contents(folder) == before
    newer = dataclasses.replace(metadata, steps=13)
    save_value(folder, params=params, metadata=newer, tokenizer=tokenizer, overwrite=True)
    assert load_value(folder).metadata.steps == 13
    assert [path.name for path in folder.parent.iterdir()] == ["value"]


def test_a_folder_of_something_else_is_never_replaced(
    tmp_path, params, metadata, tokenizer
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="it is not a value folder, so it is not replaced"):
        save_value(
            tmp_path / "mine",
            params=params,
            metadata=metadata,
            tokenizer=tokenizer,
            overwrite=True,
        )
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_save_that_fails_half_way_leaves_the_old_folder_whole(
    folder: Path, params, metadata, tokenizer, monkeypatch
) -> None:
    before = contents(folder)

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ivl_jax.checkpoint.value_folder.write_manifest", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_value(folder, params=params, metadata=metadata, tokenizer=tokenizer, overwrite=True)
    assert contents(folder) == before
    monkeypatch.undo()
    save_value(folder, params=params, metadata=metadata, tokenizer=tokenizer, overwrite=True)
    assert_equal(load_value(folder).params, params)
    assert [path.name for path in folder.parent.iterdir()] == ["value"]


# Damage and mismatch, before any array is read


@pytest.mark.usefixtures("no_arrays_read")
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_named(folder: Path, damage, how: str) -> None:
    originals = contents(folder)
    del originals["README.md"]  # may be edited
    assert {"ivl.json", "tokenizer/tokenizer.json", "params/_METADATA"} <= set(originals)
    for name, original in originals.items():
        damage(folder / name, how)
        with pytest.raises((ValueFolderError, FileNotFoundError)) as raised:
            load_value(folder)
        assert name in str(raised.value), name
        (folder / name).write_bytes(original)


@pytest.mark.usefixtures("no_arrays_read")
def test_several_damaged_files_are_all_named(folder: Path, damage) -> None:
    damage(folder / "tokenizer" / "tokenizer.json", "flip")
    damage(folder / "params" / "_METADATA", "remove")
    with pytest.raises(ValueFolderError) as raised:
        load_value(folder)
    assert "tokenizer/tokenizer.json: altered" in str(raised.value)
    assert "params/_METADATA: missing" in str(raised.value)
    assert "copy the folder again" in str(raised.value)


@pytest.mark.usefixtures("no_arrays_read")
@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.py"])
def test_a_file_added_to_the_tokenizer_is_refused(folder: Path, name: str) -> None:
    (folder / "tokenizer" / name).write_text("added")
    with pytest.raises(ValueFolderError, match=rf"tokenizer/{name}: not written with the folder"):
        load_value(folder)


def test_other_files_that_were_added_are_named(folder: Path, caplog) -> None:
    for name in ("NOTES.md", "params/x.bin", "tokenizer/.DS_Store"):
        (folder / name).write_text("added")
    load_value(folder)
    assert "not read: NOTES.md, params/x.bin, tokenizer/.DS_Store" in caplog.text


def edit(folder: Path, **changes: object) -> None:
    """Change entries of ivl.json and seal the folder again, as a forger would."""
    content = json.loads((folder / "ivl.json").read_text())
    content.update(changes)
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "ivl.json").write_text(json.dumps(content))
    write_manifest(folder, {})


@pytest.mark.usefixtures("no_arrays_read")
@pytest.mark.parametrize("version", [4, "1", None, 0, True, 10**30])
def test_an_unknown_format_version_names_found_supported_and_remedy(folder, version) -> None:
    edit(folder, format_version=version, library_versions={"ivl_jax": "9.8"})
    with pytest.raises(ValueFolderError) as raised:
        load_value(folder)
    text = str(raised.value)
    assert f"format_version {version!r}, this version of ivl_jax reads 1 to 3" in text
    assert "install the ivl_jax that wrote it (version 9.8)" in text


@pytest.mark.usefixtures("no_arrays_read")
def test_missing_unknown_and_impossible_entries_are_all_named(folder: Path) -> None:
    edit(folder, penalty=None, surprise=1, steps="12", connection="parallel", stop_ids=["a"])
    with pytest.raises(ValueFolderError) as raised:
        read_value_metadata(folder)
    text = str(raised.value)
    assert "penalty: missing" in text
    assert "surprise: unknown" in text
    assert "steps: expected a count, got '12'" in text
    assert "connection: expected one of residual, cascade, cascade_no_text" in text
    assert "stop_ids[0]: expected a count, got 'a'" in text


def test_a_folder_of_format_1_loads_without_a_fingerprint_of_weights(folder: Path) -> None:
    """There the fingerprint was that of the base's tokenizer, which says nothing of weights."""
    edit(folder, format_version=1)
    metadata = read_value_metadata(folder)
    assert metadata.format_version == 2
    assert metadata.training_base == {"name": "some/base", "fingerprint": ""}
    assert load_value(folder).metadata == metadata


@pytest.mark.usefixtures("no_arrays_read")
def test_another_tokenizer_in_the_folder_is_named(folder: Path) -> None:
    make_tokenizer(extra="xy").save_pretrained(folder / "tokenizer")
    write_manifest(folder, {})
    with pytest.raises(ValueFolderError, match="is not the tokenizer that ivl") as raised:
        load_value(folder)
    assert "fingerprint: expected" in str(raised.value)
    assert "vocab_size: expected 258, found 259" in str(raised.value)


@pytest.mark.usefixtures("no_arrays_read")
def test_another_architecture_is_named_path_by_path(folder: Path, arch) -> None:
    edit(folder, architecture=arch.to_hf() | {"intermediate_size": 128})
    with pytest.raises(TreeMismatchError) as raised:
        load_value(folder)
    assert "layers.0.mlp.up_proj.kernel: expected [32, 128], got [32, 64]" in str(raised.value)


@pytest.mark.usefixtures("no_arrays_read")
def test_an_architecture_that_is_not_supported_is_named_with_its_file(folder, arch) -> None:
    edit(folder, architecture=arch.to_hf() | {"model_type": "mamba"})
    with pytest.raises(ValueFolderError, match=r"ivl\.json: architecture: .*mamba"):
        load_value(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1', "\udcff"])
def test_an_unreadable_metadata_file_is_named(folder: Path, content: str) -> None:
    (folder / "ivl.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueFolderError, match=r"ivl\.json"):
        read_value_metadata(folder)


def test_the_error_for_another_folder_says_where_value_folders_come_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"RUN_DIR/value.*export-value"):
        load_value(tmp_path)


def test_parameters_that_do_not_fit_the_architecture_are_not_saved(
    tmp_path: Path, params, metadata, tokenizer
) -> None:
    tied = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    with pytest.raises(TreeMismatchError, match=r"lm_head\.kernel: expected"):
        save_value(tmp_path / "v", params=tied, metadata=metadata, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_the_metadatas_is_not_saved(tmp_path, params, metadata) -> None:
    with pytest.raises(ValueFolderError, match="the tokenizer to be saved is not"):
        save_value(
            tmp_path / "v",
            params=params,
            metadata=metadata,
            tokenizer=make_tokenizer(extra="xy"),
        )
    assert not list(tmp_path.iterdir())


def test_reading_the_metadata_alone_imports_neither_jax_nor_transformers(
    folder: Path, project_root: Path
) -> None:
    code = (
        "import sys; from ivl_jax.checkpoint import read_value_metadata;"
        f"print(read_value_metadata({str(folder)!r}).steps);"
        "assert not {'jax', 'orbax', 'transformers', 'torch'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=project_root, capture_output=True, text=True
    )
    assert done.stdout == "12\n"
