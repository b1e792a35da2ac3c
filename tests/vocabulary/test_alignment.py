"""A map built from two tokenizers: identity for equal ones, specials by role, honest coverage."""

import numpy as np
import pytest

from ivl_jax.vocabulary.alignment import (
    ALIGN,
    TOKENISE_BASE,
    TOKENISE_VALUE,
    AlignmentError,
    NamedTokenizer,
    build_vocabulary_map,
    named_tokenizer,
    tokenise,
)


@pytest.fixture
def sides(byte_level_tokenizer, metaspace_tokenizer, tmp_path) -> list[NamedTokenizer]:
    return [
        named_tokenizer("GPT", byte_level_tokenizer(), str(tmp_path)),
        named_tokenizer("LLAMA", metaspace_tokenizer(), str(tmp_path)),
    ]


def test_equal_tokenizers_give_the_identity(sides, toy_corpus) -> None:
    for side in sides:
        built = build_vocabulary_map(side, side, toy_corpus, method="bytes")
        index, weight = map(np.asarray, built.vocabulary_map)
        np.testing.assert_array_equal(index, np.arange(side.info.vocab_size))
        np.testing.assert_array_equal(weight, 1)
        assert built.coverage.tokens == built.coverage.text == built.coverage.mean_weight == 1
        assert built.coverage.unmapped_in_text == built.coverage.unmapped_elsewhere == ()
        seen = sorted({int(t) for row in tokenise(side.tokenizer, toy_corpus) for t in row})
        index, weight = map(
            np.asarray, build_vocabulary_map(side, side, toy_corpus, method="dtw").vocabulary_map
        )
        np.testing.assert_array_equal(index[seen], seen)
        np.testing.assert_array_equal(weight[seen], 1)


@pytest.mark.parametrize("method", ["dtw", "bytes"])
def test_special_tokens_are_paired_with_weight_one_whatever_the_text_says(
    sides, toy_corpus, method
) -> None:
    gpt, llama = sides
    # Llama puts <s> before every text: there the counts would pair it with a first word.
    built = build_vocabulary_map(llama, gpt, toy_corpus, method=method)
    index, weight = map(np.asarray, built.vocabulary_map)
    ends = [llama.info.bos_id, llama.info.eos_ids[0]]
    assert index[ends].tolist() == [gpt.info.eos_ids[0]] * 2
    assert weight[ends].tolist() == [1, 1]
    assert [role for role, _, _ in built.metadata.special_pairs] == ["begin", "end"]
    assert weight[llama.info.unk_id] == 0


def test_a_projections_rows_sum_to_one_and_special_tokens_have_one_entry(sides, toy_corpus) -> None:
    gpt, llama = sides
    built = build_vocabulary_map(llama, gpt, toy_corpus, method="projection", entries=3)
    index, weight = map(np.asarray, built.vocabulary_map)
    assert index.shape == weight.shape == (llama.info.vocab_size, 3)
    total = weight.sum(axis=1)
    np.testing.assert_allclose(total[total > 0], 1, atol=1e-6)
    assert (weight[:, 1] > 0).any()
    single = build_vocabulary_map(llama, gpt, toy_corpus, method="bytes")
    assert built.coverage.tokens == single.coverage.tokens
    assert built.coverage.text == pytest.approx(built.coverage.mean_weight)
    # The largest entry is the one that a map of single entries keeps.
    np.testing.assert_array_equal(index[:, 0], single.vocabulary_map.value_index)
    end = llama.info.eos_ids[0]
    assert (index[end].tolist(), weight[end].tolist()) == ([gpt.info.eos_ids[0], 0, 0], [1, 0, 0])


@pytest.mark.parametrize("method", ["dtw", "bytes"])
def test_coverage_counts_tokens_and_running_text(sides, toy_corpus, method) -> None:
    gpt, llama = sides
    built = build_vocabulary_map(llama, gpt, toy_corpus[:2], method=method)
    weight = np.asarray(built.vocabulary_map.weight)
    running = np.concatenate(tokenise(llama.tokenizer, toy_corpus[:2]))
    assert built.base_tokens == len(running)
    running = running[~np.isin(running, list(llama.info.special_tokens))]
    assert built.coverage.tokens == pytest.approx((weight > 0).mean())
    assert built.coverage.text == pytest.approx((weight[running] > 0).mean())
    assert built.coverage.mean_weight == pytest.approx(weight[running].mean())
    assert built.metadata.token_coverage == built.coverage.tokens
    unmapped = {token_id for token_id, _ in built.coverage.unmapped_in_text}
    assert unmapped <= {int(t) for t in running if weight[t] == 0}
    assert all(weight[token_id] == 0 for token_id in built.coverage.unmapped_elsewhere)
    assert not set(built.coverage.unmapped_elsewhere) & set(running.tolist())


def test_unmapped_tokens_of_the_text_are_listed_by_frequency(sides, toy_corpus) -> None:
    gpt, llama = sides
    texts = ["The mat. " * 3]
    built = build_vocabulary_map(llama, gpt, texts, method="bytes")
    counts = [count for _, count in built.coverage.unmapped_in_text]
    assert counts == sorted(counts, reverse=True)
    assert (built.coverage.text < 1) == bool(counts)


def test_progress_reaches_every_text_in_every_stage(sides, toy_corpus) -> None:
    for method in ("dtw", "bytes"):
        done = dict.fromkeys((TOKENISE_BASE, TOKENISE_VALUE, ALIGN), 0)

        def progress(stage: int, texts: int, done: dict[int, int] = done) -> None:
            done[stage] += texts

        build_vocabulary_map(*sides, toy_corpus, method=method, progress=progress)
        assert set(done.values()) == {len(toy_corpus)}


def test_no_texts_is_an_error(sides) -> None:
    with pytest.raises(AlignmentError, match="no texts to align"):
        build_vocabulary_map(*sides, [], method="dtw")


def test_tokenizers_that_change_every_text_cannot_be_aligned_by_bytes(
    sides, byte_level_tokenizer, tmp_path
) -> None:
    from tokenizers import normalizers

    lower = byte_level_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    side = named_tokenizer("LOWER", lower, str(tmp_path))
    with pytest.raises(AlignmentError, match=r"GPT and LOWER do not decode.*--method dtw"):
        build_vocabulary_map(sides[0], side, ["The Cat"], method="bytes")
    built = build_vocabulary_map(sides[0], side, ["The Cat", "the cat"], method="bytes")
    assert built.unequal_texts == (0,)
    assert build_vocabulary_map(sides[0], side, ["The Cat"], method="dtw").coverage.text > 0
