"""What the tests of the benchmarks share: stories260k, alone and with random value networks."""

import hashlib
import warnings

import pytest

from ivl_jax.checkpoint import save_value
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.model import ComposedModel
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


@pytest.fixture
def read_prompts(monkeypatch):
    """Batches of prompts that were to be generated from; what they get depends on each prompt.

    Decoding has tests of its own; here it would only cost its compilation.
    """
    read = []

    def generate_prepared(self, prompts, *, batch_size):
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            read.append(batch)
            for prompt in batch:
                yield Generation(
                    text=f" It is {hashlib.sha256(repr(prompt[:3]).encode()).hexdigest()[:6]}.",
                    token_ids=(5, 2),
                    finish_reason="eos",
                    prompt_tokens=len(prompt.token_ids),
                )

    monkeypatch.setattr(ComposedModel, "generate_prepared", generate_prepared)
    return read


@pytest.fixture(scope="module")
def lm_eval():
    """The harness; importing it takes seconds and warns of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
