"""A value network that reads the base's hidden states comes back from its folder whole."""

import dataclasses

import jax
import numpy as np

from ivl_jax.checkpoint import load_value, save_value
from ivl_jax.model.decoder import stack_layers, zero_additions


def test_its_projection_is_stored_and_restored(tmp_path, arch, params, metadata, tokenizer) -> None:
    reading = dataclasses.replace(arch, base_hidden_size=24)
    (name, projection), *_ = zero_additions(reading, "float32").items()
    whole = params | {name: jax.tree.map(lambda leaf: leaf + 0.5, projection)}
    described = dataclasses.replace(metadata, architecture=reading.to_hf())
    save_value(
        tmp_path / "value", params=stack_layers(whole), metadata=described, tokenizer=tokenizer
    )
    value = load_value(tmp_path / "value")
    assert value.arch == reading
    assert jax.tree.structure(value.params) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, value.params, whole)
