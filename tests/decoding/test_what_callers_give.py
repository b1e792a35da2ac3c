"""Prompts, options and models are taken in every form whose meaning is plain; others are named."""

import dataclasses
import inspect
import logging
import re
from pathlib import Path

import numpy as np
import pytest

import ivl_jax
from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import save_value
from ivl_jax.config import (
    ConfigError,
    StrengthPolicy,
    load_config,
    options_with,
    train_config_of,
)
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.engine import Engine
from ivl_jax.decoding.given_models import language_model_source, value_source
from ivl_jax.decoding.given_prompts import is_one_prompt, plain_prompts
from ivl_jax.decoding.requests import GenerationOptions
from tests.decoding.conftest import make_value
from tests.decoding.tiny import tiny_arch

HI = {"role": "user", "content": "Hi"}
SAID = [Message("system", "Be kind."), Message("user", "Hi")]


@pytest.mark.parametrize(
    ("given", "one", "plain"),
    [
        ("text", True, ["text"]),
        ("", True, [""]),
        ([1, 2], True, [[1, 2]]),
        ((1, np.int32(2)), True, [[1, 2]]),
        (np.asarray([1, 2]), True, [[1, 2]]),
        (SAID, True, [SAID]),
        ([HI], True, [[Message("user", "Hi")]]),
        ([SAID[0], HI], True, [SAID]),
        ([], False, []),
        (["a", "b"], False, ["a", "b"]),
        (("a",), False, ["a"]),
        (np.asarray([[1, 2], [3, 4]]), False, [[1, 2], [3, 4]]),
        ([[1], "a", [HI]], False, [[1], "a", [Message("user", "Hi")]]),
        ([[]], False, [[]]),
    ],
    ids=str,
)
def test_one_prompt_is_told_from_several(given, one, plain):
    assert is_one_prompt(given) is one
    found = plain_prompts(given)
    assert found == plain
    # NumPy's integers become Python's, and dicts become messages.
    parts = [part for prompt in found if isinstance(prompt, list) for part in prompt]
    assert {type(part) for part in parts} <= {int, Message}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "prompts: expected a text, token ids, or a dialogue .* got None"),
        (5, "prompts: expected a text, .* or a list of prompts, got 5 .int."),
        pytest.param(
            iter(["a", "b"]),
            "prompts: expected a text, .* or a list of prompts, got <list_iterator",
            id="iterator",
        ),
        (b"text", "prompts: expected a text, .* got b'text' .bytes."),
        (HI, "prompts: expected a text, .* got {'role': 'user', 'content': 'Hi'} .dict."),
        (["a", 5], "prompt 1: expected a text, .* got 5"),
        (["a", None], "prompt 1: expected a text"),
        ([1, "a"], "the prompt: expected a text, .* got a list with 'a'"),
        ([1, 2.5], "got a list with 2.5"),
        ([True], "prompt 0: expected a text, .* got True .bool."),
        ([["a", "b"]], "prompt 0: expected a text, .* got a list with 'a'"),
        ([HI, "a"], "the prompt: expected .* got a list with 'a'"),
        ([{"role": "user"}], r"message 0: expected the keys role and content, got \['role'\]"),
        ([{**HI, "name": "Lily"}], "expected the keys role and content"),
        ([HI, {"role": "user", "content": ["Hi"]}], "message 1: expected a text as content"),
    ],
    ids=str,
)
def test_what_is_not_a_prompt_is_a_type_error_that_says_what_is_expected(given, problem):
    with pytest.raises(TypeError, match=problem):
        plain_prompts(given)


def test_a_role_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"message 0: expected one of system, user, assistant as"):
        plain_prompts([[{"role": "robot", "content": "Hi"}]])


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"max_new_tokens": np.int64(5)}, {"max_new_tokens": 5}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"top_p": np.float32(0.5)}, {"top_p": 0.5}),
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop_ids": 7}, {"stop_ids": (7,)}),
        ({"strengths": 1}, {"strengths": (1.0,)}),
        ({"strengths": np.asarray([0.5, -1.0])}, {"strengths": (0.5, -1.0)}),
        ({"strengths": None}, {"strengths": None}),
        ({"log_probs": 2}, {"log_probs": 2}),
        ({"policy": StrengthPolicy("kl", 2.0)}, {"policy": StrengthPolicy("kl", 2.0)}),
        ({"logit_bias": {np.int64(7): 1, 5: -0.5}}, {"logit_bias": ((5, -0.5), (7, 1.0))}),
    ],
    ids=str,
)
def test_options_are_taken_as_keywords_and_as_a_mapping(keywords, expected):
    before = GenerationOptions(seed=3, strengths=(2.0,))
    wanted = dataclasses.replace(before, **expected)
    assert options_with(before, keywords) == wanted
    assert options_with({"seed": 3, "strengths": 2.0, **keywords}, {}) == wanted
    found = options_with(before, keywords)
    assert [type(getattr(found, name)) for name in expected] == [
        type(value) for value in expected.values()
    ]
    hash(found)


@pytest.mark.parametrize(
    ("options", "keywords", "problem"),
    [
        ({}, {"max_tokens": 5}, "unknown generation option 'max_tokens'; did you mean max_new_tok"),
        ({}, {"x": 5}, "unknown generation option 'x' Expected one of max_new_tokens, temperature"),
        ({}, {"max_new_tokens": "5"}, "max_new_tokens must be an integer, got '5'"),
        ({}, {"max_new_tokens": 5.0}, "max_new_tokens must be an integer, got 5.0"),
        ({}, {"seed": None}, "seed must be an integer, got None"),
        ({}, {"temperature": True, "top_p": "1"}, "temperature must be a number.*top_p must be"),
        ({}, {"stop": [1]}, r"stop must be a string, or several, got \[1\]"),
        ({}, {"strengths": ["1"]}, r"strengths must be a number, or several, got \['1'\]"),
        ({}, {"logit_bias": {"5": 1}}, "logit_bias must be a mapping from token ids to numbers"),
        ({}, {"logit_bias": {5: True}}, "logit_bias must be a mapping from token ids to numbers"),
        ({}, {"policy": "kl"}, "policy must be a StrengthPolicy, got 'kl'"),
        ({}, {"logit_bias": 5}, "logit_bias must be a mapping from token ids to numbers, got 5"),
        (5, {}, "expected GenerationOptions, or its fields as keywords such as max_new_tokens=5"),
        (None, {}, "expected GenerationOptions"),
    ],
    ids=str,
)
def test_options_of_other_kinds_are_type_errors(options, keywords, problem):
    with pytest.raises(TypeError, match=problem):
        options_with(options, keywords)


def test_keywords_are_all_fields_of_the_options():
    from ivl_jax.config import GenerationKeywords

    fields = [field.name for field in dataclasses.fields(GenerationOptions)]
    assert list(GenerationKeywords.__annotations__) == fields
    for name in fields:
        with pytest.raises(TypeError, match=f"{name} must be"):
            options_with({}, {name: object()})


@pytest.mark.parametrize(
    ("alpha", "problem"),
    [
        (1e38, "between -10,000 and 10,000, got 1e"),
        (float("nan"), "finite, got nan"),
        (float("-inf"), "finite, got -inf"),
    ],
)
def test_a_strength_that_leaves_nothing_of_the_base_is_refused(stories, value, alpha, problem):
    with pytest.raises(ConfigError, match=f"strengths must be {problem}"):
        options_with({}, {"strengths": alpha})
    with pytest.raises(ValueError, match=f"strengths must be {problem}"):
        compose(stories, value, strengths=[alpha])


def test_one_prompt_gives_one_generation_and_a_list_gives_a_list(composed):
    options = GenerationOptions(max_new_tokens=5)
    (expected,) = composed.generate(["Once"], options)
    assert composed.generate("Once", options) == expected
    assert composed.generate("Once", max_new_tokens=5) == expected
    assert composed.generate("Once", {"max_new_tokens": 5, "seed": 1}, seed=0) == expected
    assert composed.generate(composed.encode("Once"), options) == expected
    assert composed.generate(["Once"], [{"max_new_tokens": 9}], max_new_tokens=5) == [expected]
    *_, last = composed.stream("Once", max_new_tokens=5)
    assert last == expected
    told = composed.generate([Message("user", "Once")], options)
    assert composed.generate([{"role": "user", "content": "Once"}], options) == told
    assert told.prompt_tokens > expected.prompt_tokens
    with pytest.raises(TypeError, match="did you mean max_new_tokens"):
        composed.generate("Once", max_tokens=5)
    with pytest.raises(TypeError, match=r"one of `model\.prepare"):
        # Without the type checks that tests add.
        inspect.unwrap(Engine.submit)(composed.engine(), "Once")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """S, and the directory of a training run with it, which holds a value folder."""
    base = ivl_jax.load_model(family_folder("S"))
    value = make_value(base, seed=4, arch=tiny_arch(layers=1, rows=2048, context=512))
    run = tmp_path_factory.mktemp("run")
    save_value(
        run / "value", params=value.params, metadata=value.metadata, tokenizer=value.tokenizer
    )
    return base, value, run


def test_a_composition_is_made_of_paths_as_of_loaded_models(folders):
    base, value, run = folders
    ask = {"prompts": ["def f(", "import"], "options": {"max_new_tokens": 6}}
    expected = compose(base, value, strengths=[0.5]).generate(**ask)
    alone = compose(base).generate(**ask)
    path = str(run / "value")
    assert compose(str(family_folder("S"))).generate(**ask) == alone != expected
    assert compose(family_folder("S"), Path(path), strengths=0.5).generate(**ask) == expected
    assert compose(base, path, strengths=0.5).generate(**ask) == expected
    model = compose(base, path, value, strengths=0.25, draft=str(family_folder("S")))
    assert model.strengths == (0.25, 0.25)
    assert model.composition == compose(base, value, value, draft=base).composition


@pytest.mark.parametrize(
    ("load", "where", "problem"),
    [
        (
            ivl_jax.load_model,
            "value",
            "is a value folder, not a language model: load it with ivl_ja",
        ),
        (
            ivl_jax.load_model,
            "",
            "is the directory of a training run.*its value folder is .*/value",
        ),
        (
            compose,
            "value",
            r"is a value folder, not a language model.*ivl_jax\.compose, or --value",
        ),
        (
            ivl_jax.load_value,
            "",
            "the directory of a training run, whose value folder is .*/value$",
        ),
        (ivl_jax.load_value, None, "it holds a language model, which ivl_jax.load_model loads"),
    ],
)
def test_a_folder_of_another_kind_says_what_it_is(folders, load, where, problem):
    folder = family_folder("S") if where is None else folders[2] / where
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_models_of_other_kinds_are_type_errors(folders):
    value = folders[1]
    more = {"described_map": None, "schemes": {}}
    with pytest.raises(TypeError, match=r"the base comes first: compose\(base, value\)"):
        language_model_source(value, "the base")
    with pytest.raises(TypeError, match=r"the base: expected a language model .*, got 5"):
        language_model_source(5, "the base")
    with pytest.raises(TypeError, match=r"value network 2: expected a value network .*, got None"):
        value_source(None, 1, **more)
    with pytest.raises(TypeError, match=r"give several one by one: compose\(base, first, second\)"):
        value_source([value, value], 0, **more)
    assert value_source(value, 0, **more).label == "value network 1 (trained on stories)"


def test_a_training_config_is_taken_as_a_path_or_a_mapping(project_root):
    path = project_root / "configs" / "debug.toml"
    expected = load_config(path)
    assert train_config_of(expected) is expected
    assert train_config_of(str(path)) == train_config_of(path) == expected
    changed = train_config_of({"method": expected.method, "base": {"path": "S"}})
    assert changed.base.path == "S"
    with pytest.raises(
        TypeError, match=r"expected a TrainConfig, the path of a TOML file .* got 5"
    ):
        train_config_of(5)
    with pytest.raises(ConfigError, match=r"no config file at nowhere\.toml"):
        ivl_jax.train("nowhere.toml")


def test_a_beginning_of_sequence_token_that_is_spelled_out_is_read_once(composed, caplog):
    expected = composed.encode("Hi")
    bos_id = composed.prompts.base.info.bos_id
    assert expected[0] == bos_id
    with caplog.at_level(logging.WARNING):
        encoded = composed.encode("<s>Hi")
    assert encoded.count(bos_id) == 1
    assert composed.encode("<s>") == composed.encode("")
    said = "the text begins with <s>, which the tokenizer of "
    assert said in caplog.text
    caplog.clear()
    # Token ids stay as they are, and what is not the text's beginning is text.
    assert composed.encode([bos_id, bos_id, 5]) == [bos_id, bos_id, 5]
    assert composed.encode("Hi<s>").count(bos_id) == 2
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        prepared = composed.prepare(["<s>Hi", "Hi", "<s>Ho"], names=["one", "two", "three"])
    assert [prompt.token_ids.count(bos_id) for prompt in prepared] == [1, 1, 1]
    assert len(re.findall(said, caplog.text)) == 1
    assert "one and 1 more" in caplog.text


def test_a_tokenizer_that_adds_none_leaves_what_is_spelled_out(composed):
    reader = composed.prompts
    bos_id = reader.base.info.bos_id

    def tokenizer(text, **_):
        ids = [bos_id] * text.count("<s>")
        return {"input_ids": [*ids, *[9] * len(text.replace("<s>", ""))]}

    base = dataclasses.replace(reader.base, tokenizer=tokenizer)
    reader = dataclasses.replace(reader, base=base)
    assert reader.encode("<s><s>Hi") == [bos_id, bos_id, 9, 9]


def test_the_readmes_python_runs(folders, project_root):
    text = (project_root / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert code.count("meta-llama/Llama-2-13b-hf") == code.count("runs/mine/value") == 1
    code = code.replace("meta-llama/Llama-2-13b-hf", str(family_folder("S")))
    code = code.replace("runs/mine/value", str(folders[2] / "value"))
    found: dict = {}
    exec(code, found)
    assert [type(answer) for answer in found["answers"]] == [ivl_jax.Generation]
