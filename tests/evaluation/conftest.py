"""What the tests of the benchmarks share: stories260k, alone and with random value networks."""

import pytest

from ivl_jax.checkpoint import save_value
from ivl_jax.decoding.compose import compose
from tests.decoding.conftest import composed, make_value, stories, value

__all__ = ["composed", "stories", "value"]


@pytest.fixture(scope="session")
def base_alone(stories):
    """stories260k without a value network."""
    return compose(stories)


@pytest.fixture(scope="session")
def value_folder(stories, tmp_path_factory):
    """The folder of a random value network for stories260k."""
    network = make_value(stories)
    folder = tmp_path_factory.mktemp("value") / "value"
    save_value(
        folder, params=network.params, metadata=network.metadata, tokenizer=network.tokenizer
    )
    return folder
