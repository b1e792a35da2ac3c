import dataclasses
import logging

import numpy as np
import pytest

from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.programs import Programs
from ivl_jax.decoding.requests import GenerationOptions, PromptTooLongError
from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer
from ivl_jax.tokenizer_agreement import TokenizerMismatchError
from tests.decoding.conftest import make_value
from tests.decoding.tiny import assert_is_teacher_forced_arg_max, language_model, tiny_arch

PROMPTS = ["Once upon a time", "", "The big dog ran to the park and it was", "Lily said"]


def greedy(tokens, **changes):
    return GenerationOptions(max_new_tokens=tokens, **changes)


@pytest.fixture(scope="module")
def base_alone(stories):
    return compose(stories)


def test_stories260k_from_bos_prints_the_published_greedy_text(base_alone, stories260k_dir):
    expected = (stories260k_dir / "expected_greedy.txt").read_text()
    (generation,) = base_alone.generate([""], greedy(200))
    assert generation.text == expected
    assert generation.prompt_tokens == 1


def test_strength_zero_is_exactly_the_bases_text(base_alone, composed):
    expected = [g.text for g in base_alone.generate(PROMPTS, greedy(40))]
    at_zero = composed.generate(PROMPTS, greedy(40, strengths=(0.0,)))
    assert [g.text for g in at_zero] == expected
    assert [g.text for g in composed.generate(PROMPTS, greedy(40))] != expected


def test_composed_greedy_text_is_the_teacher_forced_arg_max(composed):
    for prompt, generation in zip(PROMPTS, composed.generate(PROMPTS, greedy(40)), strict=True):
        assert_is_teacher_forced_arg_max(
            composed.composition,
            composed.params,
            composed.encode(prompt),
            generation.token_ids,
            composed.strengths,
        )


def test_ragged_prompts_in_a_batch_give_the_text_of_each_alone(composed):
    together = composed.generate(PROMPTS, greedy(30))
    assert together == [composed.generate([prompt], greedy(30))[0] for prompt in PROMPTS]


def test_samples_depend_on_the_seed_and_the_prompts_index_but_not_on_the_batch(composed):
    hot = greedy(20, temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=1)
    same = [PROMPTS[0]] * 4
    by_four = composed.generate(same, hot)
    assert composed.generate(same, hot, batch_size=1) == by_four
    assert len({g.text for g in by_four}) == 4
    assert composed.generate(same, dataclasses.replace(hot, seed=2)) != by_four


def test_each_prompt_may_have_its_own_options(composed):
    options = [greedy(5), greedy(9, strengths=(0.0,)), greedy(20, stop=("e",)), greedy(7)]
    together = composed.generate([PROMPTS[0]] * 4, options)
    assert together == [composed.generate([PROMPTS[0]], own)[0] for own in options]


def test_a_prompt_longer_than_the_context_says_by_how_much_before_computing(composed):
    prompts = ["fine", [5] * 520, [5] * 512, [6] * 700]

    def fail(*_, **__):
        pytest.fail("something was computed")

    broken = dataclasses.replace(composed, programs=Programs(*[fail] * len(Programs._fields)))
    with pytest.raises(PromptTooLongError, match="8 more than the context of 512 tokens") as caught:
        broken.generate(prompts)
    assert "prompt 1" in str(caught.value)
    assert "prompt 3: 700 tokens are 188 more" in str(caught.value)
    assert "prompt 2" not in str(caught.value)


def test_the_smallest_context_counts_and_is_named(stories):
    small = make_value(stories, arch=tiny_arch(rows=512, context=50))
    with pytest.raises(PromptTooLongError, match=r"50 tokens \(that of value network 1"):
        compose(stories, small).generate([[5] * 51])


def test_generation_ends_with_the_context_as_length(composed):
    (generation, full) = composed.generate([[5] * 500, [5] * 512], greedy(100))
    assert (len(generation.token_ids), generation.finish_reason) == (12, "length")
    assert (full.text, full.token_ids, full.finish_reason) == ("", (), "length")


def test_a_stop_id_ends_the_text_and_is_not_part_of_it(base_alone):
    (free,) = base_alone.generate([""], greedy(30))
    stop = free.token_ids[12]
    first = free.token_ids.index(stop)
    (ended,) = base_alone.generate([""], greedy(30, stop_ids=(stop,)))
    assert ended.finish_reason == "eos"
    assert ended.token_ids == free.token_ids[: first + 1]
    assert free.text.startswith(ended.text)
    assert ended.text == base_alone.generate([""], greedy(first))[0].text


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_a_stop_string_that_spans_tokens_and_chunks_cuts_exactly(base_alone, chunk):
    (free,) = base_alone.generate([""], greedy(60))
    stop = free.text[41:58]
    assert len(base_alone.tokenizer(stop)["input_ids"]) > 4
    prepared = base_alone.prepare([""], greedy(60, stop=("never", stop)))
    (ended,) = base_alone.generate_prepared(prepared, chunk_tokens=chunk)
    assert ended.text == free.text[: free.text.index(stop)]
    assert ended.finish_reason == "stop_string"
    # The ids end with the token that completes the stop string.
    count = len(ended.token_ids)
    assert ended.token_ids == free.token_ids[:count]
    shorter, same = base_alone.generate([""] * 2, [greedy(count - 1), greedy(count)])
    assert stop in same.text
    assert stop not in shorter.text


def test_a_row_whose_stop_string_was_found_is_ended_on_device(composed):
    (free,) = composed.generate([""], greedy(40))
    told = []

    def recording(params, state, max_tokens, stopped, enough_done):
        told.append(stopped.tolist())
        return composed.programs.decode_chunk(params, state, max_tokens, stopped, enough_done)

    programs = composed.programs._replace(decode_chunk=recording)
    model = dataclasses.replace(composed, programs=programs)
    prepared = model.prepare(["", ""], [greedy(40, stop=(free.text[:9],)), greedy(40)])
    first, _ = model.generate_prepared(prepared, chunk_tokens=8)
    assert first.text == ""
    assert told[0] == [False, False]
    assert told[-1] == [True, False]


@pytest.mark.parametrize("chunk", [1, 5])
def test_streamed_pieces_are_the_text(composed, chunk):
    hot = greedy(60, temperature=3.0, seed=4)  # hot enough for bytes that are no characters
    (expected,) = composed.generate([PROMPTS[0]], hot)
    *pieces, generation = composed.stream(PROMPTS[0], hot, chunk_tokens=chunk)
    assert generation == expected
    assert "".join(pieces) == expected.text
    assert all(pieces)
    assert len(pieces) > 5


def test_streaming_raises_at_the_call_and_not_at_the_first_piece(composed):
    with pytest.raises(PromptTooLongError):
        composed.stream([5] * 600)


def test_text_and_tokens_agree_with_the_tokenizer(base_alone):
    for generation, prompt in zip(base_alone.generate(PROMPTS, greedy(40)), PROMPTS, strict=True):
        ids = base_alone.encode(prompt)
        decode = base_alone.tokenizer.decode
        whole = decode([*ids, *generation.token_ids], skip_special_tokens=True)
        assert decode(ids, skip_special_tokens=True) + generation.text == whole


def test_a_dialogue_goes_through_the_values_chat_format(composed):
    dialogue = [Message("user", "Tell me a story")]
    ids = composed.encode(dialogue)
    plain = make_chat_format(composed.tokenizer, template="plain")  # make_value says "plain"
    assert ids == plain.encode_prompt(dialogue).tolist()
    (generation,) = composed.generate([dialogue], greedy(5))
    assert generation == composed.generate([ids], greedy(5))[0]


def test_the_base_alone_talks_in_its_own_format(base_alone):
    dialogue = [Message("user", "Tell me a story")]
    assert base_alone.encode(dialogue) == base_alone.chat_format.encode_prompt(dialogue).tolist()


def test_an_empty_prompt_without_a_beginning_of_sequence_token_is_refused(stories):
    info = dataclasses.replace(stories.tokenizer_info, bos_id=None)
    model = compose(dataclasses.replace(stories, tokenizer_info=info))
    with pytest.raises(ValueError, match="no tokens"):
        model.generate([[]])
    base = dataclasses.replace(model.prompts.base, tokenizer=lambda *_, **__: {"input_ids": []})
    model = dataclasses.replace(model, prompts=dataclasses.replace(model.prompts, base=base))
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        model.generate([""])


def test_impossible_requests_are_named(composed):
    with pytest.raises(ValueError, match=r"prompt 1: token ids outside \[0, 512\): \[512\]"):
        composed.generate([[1], [1, 512]])
    with pytest.raises(ValueError, match="2 strengths for 1 value network"):
        composed.generate(["a"], greedy(3, strengths=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"prompt 0: logit_bias: token ids outside \[0, 512\)"):
        composed.generate(["a"], greedy(3, logit_bias={512: 1.0}))
    with pytest.raises(ValueError, match="2 prompts, but 1 options"):
        composed.generate(["a", "b"], [greedy(3)])
    with pytest.raises(ValueError, match=r"temperature must be ≥ 0.*top_p must be in"):
        GenerationOptions(temperature=-1.0, top_p=0.0)
    with pytest.raises(ValueError, match="stop"):
        GenerationOptions(stop=("END", ""))


def test_no_prompts_give_no_generations(composed):
    assert composed.generate([]) == []


def test_a_value_of_another_vocabulary_is_refused_with_both_names(stories, gpt2_tokenizer_dir):
    tokenizer = load_tokenizer(gpt2_tokenizer_dir)
    other = make_value(stories, tokenizer=tokenizer, tokenizer_info=describe_tokenizer(tokenizer))
    with pytest.raises(TokenizerMismatchError, match="value network 1") as caught:
        compose(stories, other)
    assert stories.path in str(caught.value)
    assert "vocabulary map" in str(caught.value)


def test_ids_unknown_to_the_value_keep_the_bases_logit_with_a_warning(stories, caplog):
    info = stories.tokenizer_info
    shorter = dataclasses.replace(
        info, vocab_size=511, ordinary_tokens=info.ordinary_tokens[:511], fingerprint="shorter"
    )
    value = make_value(stories, tokenizer_info=shorter)
    with caplog.at_level(logging.WARNING):
        model = compose(stories, value)
    assert "511" in caplog.text
    assert np.asarray(model.params.values[0].unknown_ids).tolist() == [511]
    # The value reads the unknown token without NaN, and the text goes on.
    (generation,) = model.generate([[1, 511]], greedy(10))
    assert isinstance(generation, Generation)
    assert len(generation.token_ids) == 10


@pytest.mark.parametrize(("base_padding", "value_padding"), [(3, 10), (10, 3)], ids=str)
def test_output_rows_padded_to_another_number_change_nothing(
    stories260k_dir, base_padding, value_padding
):
    """Qwen2.5's models have one tokenizer and 151,936 or 152,064 output rows."""
    hot = [greedy(20, strengths=(alpha,), temperature=5.0) for alpha in (1.0, -0.4, 0.5, -1.5)]

    def generated(base_padding, value_padding):
        base = language_model(stories260k_dir, seed=0, padding=base_padding)
        value = language_model(stories260k_dir, seed=1, padding=value_padding)
        return compose(base, value).generate(PROMPTS, hot)

    padded = generated(base_padding, value_padding)
    assert padded == generated(0, 0)
    assert 400 < max(token for one in padded for token in one.token_ids) < 512


def test_several_values_and_strengths_add_up(stories, value):
    other = make_value(stories, seed=1)
    twice = compose(stories, value, value, strengths=[0.1, 0.2])
    once = compose(stories, value, strengths=[0.3])
    assert twice.generate(PROMPTS, greedy(15)) == once.generate(PROMPTS, greedy(15))
    both = compose(stories, value, other, strengths=[0.3, 0.0])
    assert both.generate(PROMPTS, greedy(15)) == once.generate(PROMPTS, greedy(15))
    with pytest.raises(ValueError, match="1 strengths for 2"):
        compose(stories, value, other, strengths=[0.3])


def test_tied_heads_are_decoded_from_the_embedding_itself(composed, stories):
    """On one CPU device rows are what is read fastest; `test_sharded` has heads of their own."""
    assert "lm_head" not in stories.params
    assert "lm_head" not in composed.params.base
    held = composed.params.base["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(held, stories.params["embed_tokens"]["embedding"])
