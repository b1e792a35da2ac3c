"""Vocabulary maps are compared on the same texts, and exact composition stands beside them."""

import math

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.vocabulary_maps import Options, compare_maps, main, markdown_table
from tests.decoding.tiny import language_model

KINDS = {"fact", "docstring", "prose", "digits", "code", "Chinese", "exact_match"}


@pytest.mark.slow
def test_every_method_is_measured_and_zero_changes_nothing_but_how_tokens_are_counted() -> None:
    items = [
        Item("Where is it?", "At home.", kind, "group", split)
        for kind in ("fact", "docstring")
        for split in ("train", "test")
    ]
    value = language_model(family_folder("S"), seed=0, width=16)
    head = value.params["lm_head"]["kernel"]
    value.params["lm_head"] = {"kernel": head * 0}
    figures = compare_maps(value, items, Options(facts=1, docstrings=1, prune=0.01))
    assert list(figures) == ["X alone", "dtw", "bytes", "projection", "exact"]
    for method, row in figures.items():
        assert set(row) == KINDS, method
        assert all(math.isfinite(figure) for figure in row.values()), method
        for kind in KINDS - {"exact_match"}:
            alone = figures["X alone"][kind]
            if method == "exact":  # the sum over all spellings: more likely than one of them
                assert alone - 0.5 < row[kind] < alone + 0.05, kind
            else:
                assert row[kind] == pytest.approx(alone, rel=1e-4), (method, kind)


def test_the_table_has_a_row_per_method_and_says_shares_as_percentages() -> None:
    figures = {"X alone": {"fact": 1.5, "exact_match": 0.0}, "dtw": {"fact": 1, "exact_match": 0.5}}
    assert markdown_table(figures).splitlines() == [
        "| | fact | facts answered |",
        "| --- | ---: | ---: |",
        "| X alone | 1.500 | 0.0% |",
        "| dtw | 1.000 | 50.0% |",
    ]


def test_flags_that_cannot_be_used_are_named_before_anything_is_read(capsys) -> None:
    assert main(["--facts", "0", "--prune", "2"]) != 0
    said = capsys.readouterr().err
    for flag in ("--value is missing", "--facts 0", "--prune 2"):
        assert flag in said
