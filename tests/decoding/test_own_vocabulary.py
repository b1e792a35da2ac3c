"""Value networks with their own vocabulary decode as if everything were read anew at each step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import ValueMetadata, ValueNetwork
from ivl_jax.data.formats import Message
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.device.sampling import Sampling, row_keys, sample_tokens
from ivl_jax.decoding.own_vocabulary import (
    OwnVocabulary,
    TextReader,
    base_chat_format,
    expected_slots,
    make_own_vocabulary,
)
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.requests import GenerationOptions, PromptTooLongError
from ivl_jax.text_codec import TextCodec
from ivl_jax.tokenizer import describe_tokenizer
from ivl_jax.tokenizer_agreement import TokenizerMismatchError
from ivl_jax.vocabulary.mapping import VocabularyMapError
from ivl_jax.vocabulary.special_tokens import pair_special_tokens
from tests.decoding.anew import compose_beside, random_map, read_anew, step_anew
from tests.decoding.tiny import NEAR_TIE, language_model

PROMPTS = ["Once upon a ti", "", "naïve 水", "def add(a, b):\n    return"]


def own_lengths(model, prompt, ids, generated):
    """Tokens that each value network with its own vocabulary has to read."""
    for index, own in enumerate(model.own_vocabularies):
        if own is not None:
            yield own, len(read_anew(model, index, prompt, [*ids, *generated]))


_sample = jax.jit(sample_tokens)


def decode_anew(model, maps, prompt, options, *, row):
    """Generated ids, each from scratch; with them the margin that decided each greedy one."""
    ids, margins = model.encode(prompt), []
    strengths = model.strengths if options.strengths is None else options.strengths
    ask = (options.temperature, options.top_k, options.top_p, options.min_p)
    kinds = (np.float32, np.int32, np.float32, np.float32)
    sampling = Sampling(*(np.asarray([a], kind) for a, kind in zip(ask, kinds, strict=True)))
    key = row_keys(jnp.asarray([options.seed], jnp.uint32), jnp.asarray([row], jnp.int32))
    generated = []
    while len(generated) < options.max_new_tokens:
        if any(length > own.context for own, length in own_lengths(model, prompt, ids, generated)):
            break
        logits = step_anew(model, maps, prompt, [*ids, *generated], strengths)
        index = np.asarray([len(generated)], np.int32)
        padded = np.full((1, model.base.arch.vocab_size), -np.inf, np.float32)
        padded[0, : len(logits)] = logits
        generated.append(int(_sample(padded, sampling, key, index)[0]))
        margins.append(np.diff(np.sort(logits)[-2:])[0])
        if generated[-1] in model.stop_ids:
            break
    return generated, margins


def assert_same(generation, anew, *, greedy):
    """Token for token, up to a near-tie of greedy decoding, after which all may differ."""
    expected, margins = anew
    for place, (ours, theirs) in enumerate(zip(generation.token_ids, expected, strict=False)):
        if greedy and margins[place] < NEAR_TIE:
            return
        assert ours == theirs, (place, generation.token_ids, expected)
    assert len(generation.token_ids) == len(expected)


@pytest.fixture(scope="module")
def mixed(stories260k_dir):
    """SentencePiece base; values of its vocabulary, and of two others through maps."""
    base = language_model(stories260k_dir, seed=0)
    shared = language_model(stories260k_dir, seed=1)
    values = [language_model(family_folder(name), seed=2 + i) for i, name in enumerate("SX")]
    maps = [random_map(base, values[0]), None, random_map(base, values[1], seed=1, centred=True)]
    values.insert(1, shared)
    return compose_beside(base, *values, strengths=[1.0, -0.5, 0.7], maps=maps), maps


@pytest.fixture(scope="module")
def swapped(gpt2_tokenizer_dir, llama2_tokenizer_dir):
    """GPT-2's tokens in the base, Llama 2's in the value, whose context some texts fill."""
    base = language_model(gpt2_tokenizer_dir, seed=5, width=16)
    value = language_model(llama2_tokenizer_dir, seed=6, width=16, context=64)
    maps = [random_map(base, value)]
    return compose_beside(base, value, strengths=[1.5], maps=maps), maps


@pytest.mark.parametrize("which", ["mixed", pytest.param("swapped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 1.5], ids=["greedy", "sampled"])
def test_tokens_equal_reading_and_running_everything_anew_at_each_step(request, which, temperature):
    model, maps = request.getfixturevalue(which)
    options = GenerationOptions(max_new_tokens=24, temperature=temperature, seed=3)
    own = dataclasses.replace(options, strengths=[-2.0 * alpha for alpha in model.strengths])
    short = dataclasses.replace(options, max_new_tokens=9)
    each = [options, short, own, options]
    # The last prompt begins where the second ends, beside the two others.
    together = model.generate(PROMPTS, each, batch_size=3)
    for row, (prompt, generation) in enumerate(zip(PROMPTS, together, strict=True)):
        anew = decode_anew(model, maps, prompt, each[row], row=row)
        assert_same(generation, anew, greedy=temperature == 0)
    assert len({generation.text for generation in together}) == len(PROMPTS)


def test_the_base_reads_the_next_token_while_the_host_re_tokenises(mixed, monkeypatch):
    model, _ = mixed
    calls = []

    def recording(name, call):
        def recorded(*arguments, **named):
            calls.append((name, arguments))
            return call(*arguments, **named)

        return recorded

    programs = {
        name: recording(name, program) if name in ("read_base", "decode_step") else program
        for name, program in model.programs._asdict().items()
    }
    monkeypatch.setattr(TextReader, "push", recording("push", TextReader.push))
    watched = dataclasses.replace(model, programs=type(model.programs)(**programs))
    watched.generate(PROMPTS[0], max_new_tokens=4)
    assert [name for name, _ in calls] == ["read_base", "push", "decode_step"] * 3 + ["push"]
    assert all(given[4] is not None for name, given in calls if name == "decode_step")


def test_rows_that_are_refilled_give_what_each_prompt_alone_gives(mixed):
    model, _ = mixed
    options = [GenerationOptions(max_new_tokens=number) for number in (3, 9, 6, 8)]
    prompts = model.prepare(PROMPTS, options)
    engine = model.engine(EngineLimits(max_rows=2))
    ids, ended = [engine.submit(prompt) for prompt in prompts], {}
    while not engine.idle:
        for progress in engine.step():
            if progress.generation is not None:
                ended[progress.id] = progress.generation.token_ids
    alone = [model.generate(*each).token_ids for each in zip(PROMPTS, options, strict=True)]
    assert [ended[one] for one in ids] == alone


class Doubled:
    """A text in which every "b" after an "a" changes the token before it."""

    def __init__(self, tokens=()):
        self.tokens = [0, *tokens]

    def fork(self):
        return Doubled(self.tokens[1:])

    def push(self, ids):
        unchanged = len(self.tokens)
        for one in ids:
            if (self.tokens[-1], one) == (ord("a"), ord("b")):
                self.tokens[-1] = 99
                unchanged = min(unchanged, len(self.tokens) - 1)
            else:
                self.tokens.append(one)
        return unchanged


def test_a_block_ends_before_the_proposal_that_changes_tokens_before_it(swapped):
    reader = TextReader(swapped[0].own_vocabularies, batch=4)  # of a context of 64
    for row, length in enumerate((2, 2, 62)):
        reader.admit(row, [Doubled([7] * (length - 1))])
    reader.own_tokens(range(4), size=4)
    proposals = np.asarray([list(map(ord, "cab")), list(map(ord, "ccc"))] + [[7] * 3] * 2)
    block = reader.own_block(proposals, [3, 2, 3, 0], width=4, slots=64)
    assert block.caps.tolist() == [2, 2, 2, 0]
    (own,), (ends,) = block.tokens, block.ends
    assert own.starts.tolist() == [1, 1, 61, 0]
    assert own.tokens[0, :3].tolist() == [7, ord("c"), ord("a")]
    assert ends.tolist() == [[0, 1, 2, 2], [0, 1, 2, 2], [0, 1, 2, 2], [0, 0, 0, 0]]
    # What was proposed is not part of the text.
    assert reader.own_tokens([0], size=1)[0].tokens[0, 0] == 7


def test_a_nan_that_one_value_reads_ends_the_row_and_names_the_value(mixed):
    model, _ = mixed
    options = GenerationOptions(max_new_tokens=6)
    prepared = model.prepare(PROMPTS, options)
    free = list(model.generate_prepared(prepared, batch_size=4))
    # A token of the last prompt alone, as the third value network reads it: the second with a map.
    texts = [prompt.own_texts[1].tokens for prompt in prepared]
    token = next(t for t in texts[3] if all(t not in text for text in texts[:3]))
    broken = model.params.values[2]
    embedding = broken.params["embed_tokens"]["embedding"].at[token].set(np.nan)
    broken = broken._replace(params=broken.params | {"embed_tokens": {"embedding": embedding}})
    values = (*model.params.values[:2], broken)
    model = dataclasses.replace(model, params=model.params._replace(values=values))
    *others, failed = model.generate_prepared(prepared, batch_size=4)
    assert (failed.finish_reason, failed.token_ids) == ("error", ())
    assert "value network 3" in failed.error
    assert "value network 1" not in failed.error
    # The others say what they said, unless they come to that token themselves.
    assert [one for one in others if one.error is None] == [
        before for before, one in zip(free, others, strict=False) if one.error is None
    ]
    assert any(one.error is None for one in others)


def test_dialogues_are_read_through_the_values_template_by_both_sides(swapped):
    model, maps = swapped
    dialogues = [[Message("user", text)] for text in ("Hi", "Why?", "水", "One more")]
    options = GenerationOptions(max_new_tokens=12)
    eos = model.base.tokenizer_info.special_tokens[model.base.tokenizer_info.eos_ids[0]]
    assert model.tokenizer.decode(model.encode(dialogues[0])) == "Question: Hi\nAnswer:"
    assert model.tokenizer.decode(model.chat_format.stop_ids) == eos
    together = model.generate(dialogues, options)
    for row, (dialogue, generation) in enumerate(zip(dialogues, together, strict=True)):
        assert_same(generation, decode_anew(model, maps, dialogue, options, row=row), greedy=True)


def test_stop_strings_and_limits_end_rows_of_a_batch(swapped):
    model, _ = swapped
    free = model.generate(PROMPTS, GenerationOptions(max_new_tokens=40))
    stop = free[3].text[6:9]
    each = [GenerationOptions(max_new_tokens=40)] * 2
    each += [
        GenerationOptions(max_new_tokens=5),
        GenerationOptions(max_new_tokens=40, stop=(stop,)),
    ]
    *same, short, ended = model.generate(PROMPTS, each)
    assert same == free[:2]
    assert "length" in {generation.finish_reason for generation in free}
    # The value reads more tokens than the base writes: its context ends some rows first.
    assert min(len(generation.token_ids) for generation in free) < 40
    assert (short.token_ids, short.finish_reason) == (free[2].token_ids[:5], "length")
    assert ended.text == free[3].text[: free[3].text.index(stop)]
    assert ended.finish_reason == "stop_string"


def test_generation_stops_at_the_values_end_of_turn_even_if_the_base_knows_no_end(swapped):
    model, (described,) = swapped
    base, value = model.base, model.values[0]
    (end_id,) = base.tokenizer_info.eos_ids
    # The value says nothing but whether to stop, and says it loudly.
    only_end = np.zeros_like(described.vocabulary_map.weight)
    only_end[end_id] = 1.0
    vocabulary_map = described.vocabulary_map._replace(weight=jnp.asarray(only_end))
    maps = [described._replace(vocabulary_map=vocabulary_map)]
    endless = dataclasses.replace(base, stop_ids=())
    stopping = compose_beside(endless, value, strengths=[1000.0], maps=maps)
    assert stopping.stop_ids == (end_id,)
    options = GenerationOptions(max_new_tokens=24)
    together = stopping.generate(PROMPTS, options)
    for row, generation in enumerate(together):
        anew = decode_anew(stopping, maps, PROMPTS[row], options, row=row)
        assert_same(generation, anew, greedy=True)
    assert [generation.finish_reason for generation in together] == ["eos"] * len(PROMPTS)
    assert {generation.token_ids[-1] for generation in together} == {end_id}


def test_a_prompt_beyond_the_values_own_context_is_refused_by_name(swapped):
    model, _ = swapped
    with pytest.raises(PromptTooLongError, match=r"more than the context of 64 .*its own vocabul"):
        model.generate(["word " * 70])


def test_a_prompt_beyond_the_bases_context_is_not_read_for_the_values(swapped, monkeypatch):
    model, _ = swapped
    read = []
    monkeypatch.setattr(OwnVocabulary, "read_prompt", lambda *given: read.append(given))
    with pytest.raises(PromptTooLongError, match=r"1 more than the context of \d+ tokens"):
        model.prepare([[5] * (model.context + 1)])
    assert read == []


def test_maps_and_schemes_that_do_not_fit_are_refused_with_both_names(stories260k_dir):
    base, other = (language_model(family_folder(name), seed=0) for name in "SX")
    value = language_model(stories260k_dir, seed=1)
    with pytest.raises(TokenizerMismatchError) as caught:
        compose(base, value)
    command = f"build --base-tokenizer {base.path} --value-tokenizer {value.path} --text TEXT"
    assert command in str(caught.value)
    assert "ivl-serve: --map NAME=MAP.safetensors" in str(caught.value)
    with pytest.raises(VocabularyMapError, match="MAP was built for base b") as caught:
        compose(other, value, maps=[random_map(base, value)])
    assert other.path in str(caught.value)
    with pytest.raises(ValueError, match=r"2 maps for 1 value network"):
        compose(base, value, maps=[None, None])
    network = ValueNetwork(
        arch=value.arch,
        params=value.params,
        connection="cascade",
        metadata=ValueMetadata(
            architecture=value.arch.to_hf(),
            connection="cascade",
            penalty={},
            tokenizer=value.tokenizer_info.to_json(),
            training_base={"name": "stories", "fingerprint": ""},
            chat_template="plain",
            stop_ids=value.stop_ids,
        ),
        tokenizer=value.tokenizer,
        tokenizer_info=value.tokenizer_info,
        chat_template="plain",
        stop_ids=value.stop_ids,
    )
    with pytest.raises(ValueError, match="only the residual scheme is defined") as caught:
        compose(base, network, maps=[random_map(base, value)])
    assert "trained on stories" in str(caught.value)
    assert base.path in str(caught.value)


def test_readings_hold_what_changed_and_at_least_the_last_token(swapped):
    model, _ = swapped
    (own,) = model.own_vocabularies
    prompts = ["One", "水と火"]
    rows = [model.prepare([prompt])[0] for prompt in prompts]
    reader = TextReader([own], batch=3)
    slots = [expected_slots([own], row.own_texts, new_tokens=10) for row in rows]
    for place, row in enumerate(rows):
        reader.admit(place, row.own_texts)
    caches = [[], []]
    pushed = [rows[0].token_ids + rows[1].token_ids, rows[1].token_ids + rows[0].token_ids]
    for step in range(len(pushed[0]) + 1):
        (reading,) = reader.own_tokens(range(2), size=3)
        assert reading.tokens.shape[0] == 3
        assert reading.counts.min() == 1
        for row in range(2):
            start, count = int(reading.starts[row]), int(reading.counts[row])
            caches[row][start:] = reading.tokens[row, :count].tolist()
            text = own.retokenizer.begin(rows[row].token_ids)
            text.push(pushed[row][:step])
            assert caches[row] == text.tokens
            assert len(text.tokens) <= reader.slots() <= max(slots)
        assert reader.push({row: pushed[row][step : step + 1] for row in range(2)}) == set()


def test_caches_grow_and_keep_what_they_hold(swapped):
    model, _ = swapped
    programs = build_programs(model.composition)
    sizes = {"rows": 2, "capacity": 16, "stop_ids": 8}
    state = programs.empty(**sizes, mapped_capacity=4)
    ones = jax.tree.map(jnp.ones_like, state.caches)
    larger = programs.empty(**sizes, mapped_capacity=6)
    moved = programs.place(larger, state._replace(caches=ones), np.arange(2, dtype=np.int32))
    (grown,), (held,) = moved.caches.values, ones.values
    assert grown.keys[0].shape[2] == 6
    np.testing.assert_array_equal(grown.keys[0][:, :, :4], held.keys[0])
    np.testing.assert_array_equal(grown.values[0][:, :, 4:], 0)


def test_a_template_written_for_the_value_has_its_special_tokens_by_role_in_the_base():
    """ChatML's markers: what ends a turn is the base's end; what it lacks is text to it."""
    base = toy_tokenizer(bos_token="<s>", eos_token="</s>")
    value = toy_tokenizer(bos_token="<bos>", eos_token="<|im_end|>", also=["<|im_start|>"])
    value.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    codecs = [TextCodec(tokenizer, describe_tokenizer(tokenizer)) for tokenizer in (base, value)]
    pairs = pair_special_tokens(*(c.info for c in codecs), base_name="b", value_name="v")
    own = make_own_vocabulary(
        *codecs,
        pairs,
        name="value network 1",
        context=99,
        tokenizer=value,
        chat_template="auto",
        value_stop_ids=[value.eos_token_id],
    )
    chat = base_chat_format(base, own)
    dialogue = [Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "?")]
    text = "<s><|im_start|>user\nHi{}\n<|im_start|>assistant\nYo{}\n<|im_start|>user\n?{}\n"
    tokens = base.convert_ids_to_tokens(chat.encode_prompt(dialogue).tolist())
    assert tokens.count("</s>") == 3
    assert base.decode(chat.encode_prompt(dialogue)) == (
        text.format(*["</s>"] * 3) + "<|im_start|>assistant\n"
    )
    assert chat.stop_ids == own.stop_ids == (base.eos_token_id,)
    prompt = own.read_prompt(chat.encode_prompt(dialogue).tolist(), dialogue)
    assert prompt.tokens == own.chat_format.encode_prompt(dialogue).tolist()
    assert value.convert_tokens_to_ids("<|im_start|>") in prompt.tokens
    # As a bare text the same prompt reads the same: spelled markers are the value's own tokens.
    ids = chat.encode_prompt(dialogue).tolist()
    assert own.read_prompt(ids, None).tokens == prompt.tokens


def toy_tokenizer(*, also=(), **roles):
    """One token a byte, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in also])
    return tokenizer
