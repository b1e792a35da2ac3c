"""Which warnings fail a test: those of our own modules, whoever else's are shown."""

import warnings

import pytest


def _warn(module: str) -> None:
    # An empty registry: else a second warning from the same place would not be given.
    warnings.warn_explicit("old", FutureWarning, f"{module}.py", 1, module=module, registry={})


@pytest.mark.parametrize(
    "module", ["ivl_jax", "ivl_jax.model.layers", "benchmarks.decode", "train"]
)
def test_a_warning_of_ours_is_an_error(module: str) -> None:
    with pytest.raises(FutureWarning, match="old"):
        _warn(module)


@pytest.mark.parametrize("module", ["transformers.models.llama", "ivl_jax_tools", "trainer"])
def test_a_warning_of_others_is_shown(module: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        _warn(module)
    assert [str(warning.message) for warning in shown] == ["old"]
