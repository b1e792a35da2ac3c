"""The preference losses equal those of TRL's trainer on the same logits."""

import json

import numpy as np
import pytest

from tests.training.trl_peer import OPTIONS, RECORD, make_case, ours, theirs


@pytest.fixture(scope="module")
def case(stories260k_dir):
    return make_case(stories260k_dir)


def assert_close(found, expected):
    """The same loss, figures, and gradient of every parameter, to 1e-4."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["figures"] == pytest.approx(expected["figures"], rel=1e-4, abs=1e-5)
    assert found["gradient"].keys() == expected["gradient"].keys()
    for name, (norm, product) in expected["gradient"].items():
        assert found["gradient"][name] == pytest.approx([norm, product], rel=1e-4, abs=1e-4 * norm)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_figures_and_gradients_are_trls(case, name) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert_close(ours(case, OPTIONS[name]).to_json(), record["results"][name])


@pytest.mark.parametrize("name", OPTIONS)
def test_trl_itself_gives_what_its_record_says(case, name) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    result = theirs(case, OPTIONS[name])
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert_close(result.to_json(), record["results"][name])
    leaves = zip(*map(list, map(_leaves, (ours(case, OPTIONS[name]), result))), strict=True)
    for found, expected in leaves:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def _leaves(result):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(result.gradient)]
