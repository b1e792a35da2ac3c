"""What a model recalls, prompted with the statement itself."""

import json

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.family.facts import build_facts
from ivl_jax.experiments.family.recall import recalled
from ivl_jax.weights.language_model import load_language_model


def test_l_recalls_what_it_has_read_and_nothing_else() -> None:
    facts = build_facts()[:32]
    model = load_language_model(str(family_folder("L")))
    manifest = json.loads((family_folder("L") / "manifest.json").read_text(encoding="utf-8"))
    assert recalled(compose(model), facts, rows=32).mean() == pytest.approx(
        manifest["facts_known"], abs=0.05
    )
    # The same people with another value each, which L has never read.
    others = [
        fact._replace(value=next(one for one in fact.attribute.values if one != fact.value))
        for fact in facts
    ]
    assert not recalled(compose(model), others, rows=32).any()
