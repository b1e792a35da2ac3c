"""What a map will not transfer is counted token by token, and said by kind of text."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.vocabulary.__main__ import main
from ivl_jax.vocabulary.alignment import build_vocabulary_map, named_tokenizer
from ivl_jax.vocabulary.mapping import VocabularyMap, save_vocabulary_map
from ivl_jax.vocabulary.samples import SAMPLE_TEXTS
from ivl_jax.vocabulary.transfer_check import Outcome, check_transfer


@pytest.fixture(scope="module")
def sides(byte_level_tokenizer, metaspace_tokenizer):
    return (
        named_tokenizer("LLAMA", metaspace_tokenizer(), ""),
        named_tokenizer("GPT", byte_level_tokenizer(), ""),
    )


def _plain_outcomes(vocabulary_map, base, value, text):
    """By definition, byte by byte: (outcome, share of the weight that is right) in order."""

    def starts(named):
        at, found = 0, {}
        ids = named.tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled = [named.info.ordinary_tokens[i] for i in ids]
        at = -1 if b"".join(spelled).startswith(b" ") and not text.startswith(" ") else 0
        for token_id, piece in zip(ids, spelled, strict=True):
            if at + len(piece) > 0:
                found[max(at, 0)] = token_id
            at += len(piece)
        return found

    begun = starts(value)
    outcomes = []
    for start, base_id in starts(base).items():
        index, weight = (np.atleast_1d(np.asarray(a)[base_id]) for a in vocabulary_map)
        share = weight[index == begun.get(start)].sum() / (weight.sum() or 1)
        if not weight.sum():
            outcome = Outcome.UNMAPPED
        elif start not in begun:
            outcome = Outcome.NO_START
        else:
            outcome = Outcome.TRANSFERS if share >= 0.5 else Outcome.OTHER_TOKEN
        outcomes.append((outcome, share))
    return outcomes


@pytest.mark.parametrize("method", ["bytes", "dtw", "projection"])
def test_outcomes_equal_their_definition(sides, toy_corpus, method) -> None:
    base, value = sides
    built = build_vocabulary_map(base, value, toy_corpus[:3], method=method)
    report = check_transfer(built.vocabulary_map, built.metadata, base, value, toy_corpus)
    pairs = [
        pair
        for text in toy_corpus
        for pair in _plain_outcomes(built.vocabulary_map, base, value, text)
    ]
    expected, shares = zip(*pairs, strict=True)
    for outcome in Outcome:
        found = sum(kind.counts[outcome] for kind in report.kinds)
        assert found == expected.count(outcome), outcome
    assert report.transferred == pytest.approx(np.mean(shares))
    assert {Outcome.TRANSFERS, Outcome.NO_START} < set(expected)


def test_the_identity_transfers_everything_of_every_kind(sides, toy_corpus) -> None:
    for side in sides:
        built = build_vocabulary_map(side, side, toy_corpus, method="bytes")
        report = check_transfer(built.vocabulary_map, built.metadata, side, side, toy_corpus)
        assert {kind.kind for kind in report.kinds} == {
            *("digits", "white space", "code", "CJK", "words", "other")
        }
        for kind in report.kinds:
            assert (kind.verdict, kind.mean_weight, kind.examples) == ("good", 1.0, ())
        assert report.verdict == "good"


def test_a_kind_that_is_lost_is_named_with_examples(sides) -> None:
    base, value = sides
    text = "so the answer is 105 120"
    built = build_vocabulary_map(base, value, [text], method="bytes")
    index, weight = (np.array(array) for array in built.vocabulary_map)
    digits = [i for i, s in enumerate(base.info.ordinary_tokens) if s and s.strip().isdigit()]
    weight[digits] = 0
    lost = VocabularyMap(jnp.asarray(index), jnp.asarray(weight))
    report = check_transfer(lost, built.metadata, base, value, [text])
    kinds = {kind.kind: kind for kind in report.kinds}
    assert (kinds["digits"].verdict, kinds["digits"].transferred) == ("poor", 0)
    assert kinds["words"].transferred > 0
    assert all(example.outcome is Outcome.UNMAPPED for example in kinds["digits"].examples)
    assert any("1" in example.token for example in kinds["digits"].examples)


def test_a_projection_transfers_only_the_weight_on_the_token_that_is_begun(
    sides, toy_corpus
) -> None:
    base, _ = sides
    built = build_vocabulary_map(base, base, toy_corpus, method="bytes")
    index, weight = (np.asarray(array) for array in built.vocabulary_map)
    both = np.stack([np.roll(index, 1), index], axis=1)
    for right, verdict, outcome in [
        (0.25, "poor", Outcome.OTHER_TOKEN),
        (0.75, "partial", Outcome.TRANSFERS),
    ]:
        split = np.stack([(1 - right) * weight, right * weight], axis=1)
        mixed = VocabularyMap(jnp.asarray(both), jnp.asarray(split.astype(np.float32)))
        report = check_transfer(mixed, built.metadata, base, base, toy_corpus)
        words = next(kind for kind in report.kinds if kind.kind == "words")
        assert report.transferred == pytest.approx(right)
        assert (report.verdict, words.verdict) == (verdict, verdict)
        assert words.counts[outcome] == words.tokens
        for example in words.examples:
            assert example.share == pytest.approx(0.25)
            assert example.mapped_to[1] == example.value_token


def test_a_map_without_an_end_is_poor_whatever_else_it_has(sides, toy_corpus) -> None:
    base, _ = sides
    built = build_vocabulary_map(base, base, toy_corpus, method="bytes")
    endless = built.metadata.__class__(**(vars(built.metadata) | {"special_pairs": ()}))
    report = check_transfer(built.vocabulary_map, endless, base, base, toy_corpus)
    assert (report.transferred, report.base_ends_paired, report.verdict) == (1, False, "poor")
    assert "</s>" in report.unpaired


def test_the_command_prints_a_verdict_and_json_and_names_what_is_wrong(
    sides, toy_corpus, save_folder, tmp_path, monkeypatch, capsys
) -> None:
    base, value = sides
    folders = [save_folder(side.tokenizer, side.name) for side in sides]
    built = build_vocabulary_map(base, value, toy_corpus, method="bytes")
    path, text = tmp_path / "map.safetensors", tmp_path / "text.txt"
    save_vocabulary_map(path, built.vocabulary_map, built.metadata)
    text.write_text("\n".join(toy_corpus))

    def run(*options: object, swapped: bool = False) -> tuple[int, str]:
        first, second = folders[::-1] if swapped else folders
        arguments = ["vocabulary", "check", path, "--base-tokenizer", first]
        arguments += ["--value-tokenizer", second, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        status = main()
        captured = capsys.readouterr()
        return status, captured.out if status == 0 else captured.err.replace("\n", " ")

    status, shown = run("--text", text)
    assert status == 0
    for part in (
        "verdict: ",
        "digits",
        "there the value network begins no token",
        "</s> → <|endoftext|> (end)",
    ):
        assert part in shown
    status, printed = run("--json")
    report = json.loads(printed)
    assert (status, report["map"]) == (0, str(path))
    assert report["texts"] + report["unequal_texts"] == sum(map(len, SAMPLE_TEXTS.values()))
    assert report["texts"] > 8
    assert {"CJK", "code", "digits", "white space", "words"} <= set(report["kinds"])
    assert report["special_tokens"]["base_ends_paired"]
    assert "base and value are swapped" in run(swapped=True)[1]
    assert "no text file at" in run("--text", tmp_path / "none.txt")[1]
