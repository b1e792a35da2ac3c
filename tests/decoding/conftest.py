import dataclasses

import jax
import pytest

from ivl_jax.checkpoint import ValueMetadata, ValueNetwork
from ivl_jax.decoding.compose import compose
from ivl_jax.model.decoder import init_params
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.tiny import tiny_arch


@pytest.fixture(scope="session")
def stories(stories260k_dir):
    """stories260k as a base."""
    return load_language_model(stories260k_dir)


def make_value(base, *, seed=0, connection="residual", arch=None, **changes):
    """A random value network in the base's vocabulary; its logits are as large as the base's."""
    arch = tiny_arch(width=32, heads=4, kv_heads=4, rows=512, context=512) if arch is None else arch
    fields = {
        "arch": arch,
        "params": jax.jit(lambda key: init_params(arch, key))(jax.random.key(seed)),
        "connection": connection,
        "metadata": ValueMetadata(
            architecture=arch.to_hf(),
            connection=connection,
            penalty={"kind": "none", "weight": 0.0, "positions": "real"},
            tokenizer=base.tokenizer_info.to_json(),
            training_base={"name": "stories", "fingerprint": ""},
            chat_template="plain",
            stop_ids=base.stop_ids,
        ),
        "tokenizer": base.tokenizer,
        "tokenizer_info": base.tokenizer_info,
        "chat_template": "plain",
        "stop_ids": base.stop_ids,
    }
    return ValueNetwork(**{**fields, **changes})


@pytest.fixture(scope="session")
def small(stories):
    """A random base of one layer that speaks stories260k's tokens."""
    arch = tiny_arch(layers=1, rows=512, context=512)
    params = jax.jit(lambda key: init_params(arch, key))(jax.random.key(7))
    return dataclasses.replace(stories, path="small", arch=arch, params=params)


def small_value(small, seed, *, width=16):
    arch = tiny_arch(width=width, heads=2, kv_heads=1, layers=1, rows=512, context=512)
    return make_value(small, seed=seed, arch=arch)


@pytest.fixture(scope="session")
def value(stories):
    """A random value network for stories260k."""
    return make_value(stories)


@pytest.fixture(scope="session")
def composed(stories, value):
    """stories260k + value; the value is weak enough that the text stays words."""
    return compose(stories, value, strengths=[0.3])


@pytest.fixture
def recorded(composed):
    """The model, and the programs that it runs, with what they are given."""
    calls = []

    def recording(name, program):
        def call(*arguments, **named):
            calls.append((name, arguments, named))
            return program(*arguments, **named)

        return call

    programs = composed.programs._asdict().items()
    recorded = type(composed.programs)(*[recording(*pair) for pair in programs])
    return dataclasses.replace(composed, programs=recorded), calls
