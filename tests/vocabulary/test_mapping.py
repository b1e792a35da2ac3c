"""A map is applied as the sparse matrix it stands for, and its file is checked on both sides."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.vocabulary.mapping import (
    MapMetadata,
    VocabularyMap,
    VocabularyMapError,
    apply_vocabulary_map,
    check_vocabulary_map,
    load_vocabulary_map,
    save_vocabulary_map,
)

B, T, VV, VB = 2, 3, 7, 5
METADATA = MapMetadata(
    method="dtw",
    base_name="llama",
    base_fingerprint="b" * 64,
    value_name="gpt",
    value_fingerprint="v" * 64,
    value_vocab_size=VV,
    centred=True,
    token_coverage=0.6,
    text_coverage=0.75,
    texts=3,
    special_pairs=(("begin", 1, 2), ("end", 2, 3)),
)


def _map() -> VocabularyMap:
    return VocabularyMap(
        jnp.array([3, 0, 6, 3, 1], jnp.int32), jnp.array([1.0, 0.0, 0.25, 0.5, 1.0])
    )


def _logits(seed: int = 0, width: int = VV) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, T, width))


def _projection() -> VocabularyMap:
    index = [[3, 1, 0], [0, 0, 0], [6, 0, 0], [3, 5, 6], [1, 0, 0]]
    weight = [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [1.0, 0, 0]]
    return VocabularyMap(jnp.array(index, jnp.int32), jnp.array(weight))


def _dense(vocabulary_map: VocabularyMap, width: int) -> np.ndarray:
    matrix = np.zeros((len(vocabulary_map.weight), width), np.float32)
    for row, (index, weight) in enumerate(zip(*map(np.asarray, vocabulary_map), strict=True)):
        np.add.at(matrix[row], index, weight)
    return matrix


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, VV - 1), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=VB,
        max_size=VB,
    )
)
def test_gather_equals_the_dense_matrix_the_authors_store(rows: list[tuple[int, float]]) -> None:
    index, weight = zip(*rows, strict=True)
    vocabulary_map = VocabularyMap(jnp.array(index, jnp.int32), jnp.array(weight, jnp.float32))
    expected = np.asarray(_logits()) @ _dense(vocabulary_map, VV).T
    got = jax.jit(apply_vocabulary_map)(_logits(), vocabulary_map)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans())
def test_a_projection_equals_its_dense_matrix(seed: int, entries: int, centred: bool) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, VV, (VB, entries))
    weight = rng.random((VB, entries)) * (rng.random((VB, entries)) < 0.6)
    vocabulary_map = VocabularyMap(jnp.array(index, jnp.int32), jnp.array(weight, jnp.float32))
    matrix, logits = _dense(vocabulary_map, VV), np.asarray(_logits())
    if centred and (used := matrix.any(axis=0)).any():
        logits = logits - logits[..., used].mean(axis=-1, keepdims=True)
    got = apply_vocabulary_map(_logits(), vocabulary_map, centred=centred)
    np.testing.assert_allclose(got, logits @ matrix.T, atol=1e-5)


def test_a_projection_passes_a_constant_on_to_every_mapped_token() -> None:
    shifted = apply_vocabulary_map(_logits() + 10.0, _projection())
    expected = np.asarray(apply_vocabulary_map(_logits(), _projection()))
    np.testing.assert_allclose(shifted, expected + 10.0 * (np.arange(VB) != 1), atol=1e-5)


def test_unmapped_tokens_get_value_logit_zero_whatever_the_value_says() -> None:
    logits = _logits().at[..., 0].set(jnp.inf)
    mapped = np.asarray(apply_vocabulary_map(logits, _map()))
    assert (mapped[..., 1] == 0).all()
    assert np.isfinite(mapped).all()


def test_columns_beyond_the_value_tokenizer_are_never_read() -> None:
    padded = jnp.concatenate([_logits(), jnp.full((B, T, 4), -jnp.inf)], axis=-1)
    for centred in (False, True):
        np.testing.assert_array_equal(
            apply_vocabulary_map(padded, _map(), centred=centred),
            apply_vocabulary_map(_logits(), _map(), centred=centred),
        )


def test_centring_is_over_the_value_tokens_in_use_and_removes_a_constant() -> None:
    used = np.asarray(_logits())[..., [1, 3, 6]]
    expected = np.asarray(_logits()) - used.mean(-1, keepdims=True)
    centred = apply_vocabulary_map(_logits(), _map(), centred=True)
    np.testing.assert_allclose(centred, expected @ _dense(_map(), VV).T, atol=1e-6)
    shifted = apply_vocabulary_map(_logits() + 100.0, _map(), centred=True)
    np.testing.assert_allclose(shifted, centred, atol=1e-4)
    plain = apply_vocabulary_map(_logits() + 100.0, _map())
    assert np.abs(plain - apply_vocabulary_map(_logits(), _map())).max() > 20


def test_a_map_without_any_pair_gives_zeros() -> None:
    nothing = VocabularyMap(jnp.zeros(VB, jnp.int32), jnp.zeros(VB))
    for centred in (False, True):
        assert not np.asarray(apply_vocabulary_map(_logits(), nothing, centred=centred)).any()


def test_bfloat16_logits_are_mapped_in_float32() -> None:
    mapped = apply_vocabulary_map(_logits().astype(jnp.bfloat16), _map())
    assert mapped.dtype == jnp.float32


def test_an_index_beyond_the_value_columns_is_loud() -> None:
    mapped = np.asarray(apply_vocabulary_map(_logits(width=4), _map()))
    assert np.isnan(mapped[..., 2]).all()
    assert np.isfinite(mapped[..., [0, 1, 3, 4]]).all()


def test_a_projections_file_gives_it_back_under_a_version_that_earlier_readers_refuse(
    tmp_path: Path,
) -> None:
    path = tmp_path / "map.safetensors"
    save_vocabulary_map(path, _projection(), METADATA)
    loaded, metadata = load_vocabulary_map(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, _projection())
    assert metadata == METADATA
    assert b'format_version\\": 2' in path.read_bytes()
    save_vocabulary_map(path, _map(), METADATA)
    assert b'format_version\\": 1' in path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "version", "message"),
    [
        ({"weight": np.full((VB, 2), 0.4, np.float32)}, 2, "5 rows sum to neither 0 nor 1"),
        ({"weight": np.full((VB, 3), 0.5, np.float32)}, 2, r"shape \(5, 2\), weight \(5, 3\)"),
        ({"weight": np.ones(VB, np.float32)}, 2, "weight: expected a matrix of float32"),
        ({"value_index": np.zeros((VB, 0), np.int32)}, 2, "expected a matrix of int32"),
        ({}, 1, "value_index: expected a vector of int32"),
    ],
)
def test_an_altered_projection_is_refused(tmp_path: Path, changes, version, message) -> None:
    path = tmp_path / "map.safetensors"
    index, weight = np.zeros((VB, 2), np.int32), np.full((VB, 2), 0.5, np.float32)
    tensors = {"value_index": index, "weight": weight} | changes
    _altered(path, tensors=tensors, format_version=version)
    with pytest.raises(VocabularyMapError, match=message):
        load_vocabulary_map(path)


def test_file_gives_back_the_map_and_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    path.write_bytes(b"an older file")
    save_vocabulary_map(path, _map(), METADATA)
    loaded, metadata = load_vocabulary_map(path)
    assert metadata == METADATA
    assert loaded.value_index.dtype == jnp.int32
    np.testing.assert_array_equal(loaded.value_index, _map().value_index)
    np.testing.assert_array_equal(loaded.weight, _map().weight)
    assert [p.name for p in tmp_path.iterdir()] == ["map.safetensors"]


def test_missing_file_names_the_build_command(tmp_path: Path) -> None:
    with pytest.raises(
        VocabularyMapError, match=r"no vocabulary map .*vocabulary build --base-tok"
    ):
        load_vocabulary_map(tmp_path / "map.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a map at all", safetensors.numpy.save({})])
def test_other_files_are_not_maps(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "map.safetensors"
    path.write_bytes(content)
    with pytest.raises(VocabularyMapError, match="not a vocabulary map"):
        load_vocabulary_map(path)


def _altered(path: Path, *, tensors: dict[str, np.ndarray] | None = None, **record: object) -> None:
    """Write a map's file with other tensors or other metadata."""
    fields = {"format_version": 1, **dataclasses.asdict(METADATA), **record}
    content = {"value_index": np.zeros(VB, np.int32), "weight": np.ones(VB, np.float32)}
    safetensors.numpy.save_file(
        {**content, **(tensors or {})},
        path,
        metadata={"ivl_jax.vocabulary_map": json.dumps(fields)},
    )


def test_other_format_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    _altered(path, format_version=3)
    with pytest.raises(VocabularyMapError, match="format 3, but this ivl_jax reads 1 and 2"):
        load_vocabulary_map(path)


def test_unknown_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    _altered(path, colour="blue")
    with pytest.raises(VocabularyMapError, match=r"expected the metadata keys .* got .*colour"):
        load_vocabulary_map(path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("value_vocab_size", "7", "a count, got text"),
        ("token_coverage", 2.5, "a share, got a number"),
        ("special_pairs", [["eos", 1]], "a list of role, base id and value id, got a list"),
        ("centred", 1, "true or false, got a number"),
        ("base_name", None, "text, got null"),
    ],
)
def test_metadata_of_another_kind_is_named(
    tmp_path: Path, field: str, value: object, expected: str
) -> None:
    path = tmp_path / "map.safetensors"
    _altered(path, **{field: value})
    with pytest.raises(
        VocabularyMapError, match=rf"{path}: metadata: {field}: expected {expected}"
    ):
        load_vocabulary_map(path)


@pytest.mark.parametrize("header", [b'{"__metadata__":1}', b'{"__metadata__":{}}', b"[" * 99, b"{"])
def test_a_header_of_another_kind_is_no_map(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "map.safetensors"
    for length in (len(header), 1 << 62):
        path.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(VocabularyMapError, match=rf"{path} is not a vocabulary map"):
            load_vocabulary_map(path)


def test_a_map_of_next_to_nothing_is_said(tmp_path: Path, caplog) -> None:
    path = tmp_path / "map.safetensors"
    _altered(path, token_coverage=0.001)
    load_vocabulary_map(path)
    assert f"{path}: the map covers 0.10% of the base's tokens (below 5%)" in caplog.text
    caplog.clear()
    _altered(path, token_coverage=0.05)
    load_vocabulary_map(path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"more": np.zeros(1, np.float32)}, "expected the tensors"),
        ({"weight": np.ones(VB, np.float64)}, "weight: expected a vector of float32, got float64"),
        ({"weight": np.ones((VB, 1), np.float32)}, "weight: expected a vector"),
        ({"weight": np.ones(VB + 1, np.float32)}, "value_index has 5 rows, weight 6"),
        ({"value_index": np.full(VB, VV, np.int32)}, "from 7 to 7, but .* ids 0 to 6"),
        ({"value_index": np.full(VB, -1, np.int32)}, "from -1 to -1"),
        ({"weight": np.full(VB, np.nan, np.float32)}, "negative or not finite"),
        ({"weight": np.full(VB, -1, np.float32)}, "negative or not finite"),
    ],
)
def test_impossible_arrays_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "map.safetensors"
    _altered(path, tensors=tensors)
    with pytest.raises(VocabularyMapError, match=message):
        load_vocabulary_map(path)


def _check(base: str, value: str) -> None:
    check_vocabulary_map(
        METADATA,
        path="map.safetensors",
        base_name="models/B",
        base_fingerprint=base * 64,
        value_name="runs/V",
        value_fingerprint=value * 64,
    )


def test_a_map_for_these_tokenizers_passes() -> None:
    _check("b", "v")


@pytest.mark.parametrize(
    ("base", "value", "parts"),
    [
        ("x", "v", ["base tokenizer is llama", "models/B has fingerprint xxxx"]),
        ("b", "x", ["value tokenizer is gpt", "runs/V has fingerprint xxxx"]),
        ("v", "b", ["base and value are swapped"]),
    ],
)
def test_a_map_for_other_tokenizers_names_both_and_the_command(
    base: str, value: str, parts: list[str]
) -> None:
    with pytest.raises(VocabularyMapError) as caught:
        _check(base, value)
    message = str(caught.value)
    command = "vocabulary build --base-tokenizer models/B --value-tokenizer runs/V"
    for part in ("map.safetensors was built for base llama and value gpt", command, *parts):
        assert part in message
