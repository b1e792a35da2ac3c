"""Decoding with a value network of another vocabulary: host time, and tokens per second.

In: GSM8K and two tokenizers under ../shared; the embedded family. Out: what the host does per step,
between two steps of the device, at several batches; then tokens per second of L with X through a
map, compared with the same networks in one vocabulary.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import PROJECT_ROOT
from benchmarks.timing import Figures, time_in_turn
from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.own_vocabulary import OwnVocabulary, TextReader, make_own_vocabulary
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.model.decoder import init_params
from ivl_jax.text_codec import TextCodec
from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer
from ivl_jax.vocabulary.alignment import build_from_rows, named_tokenizer, tokenise
from ivl_jax.vocabulary.mapping import DescribedMap
from ivl_jax.vocabulary.special_tokens import pair_special_tokens
from ivl_jax.weights.language_model import LanguageModel, load_language_model

ABOUT = "decoding through a vocabulary map: host time per step; the peer has one vocabulary"

SHARED = PROJECT_ROOT.parent / "shared"
BATCHES = (1, 8, 32)
# A tenth of a step of 5 ms, at the largest batch.
MOST_HOST_TIME = 0.5
# Of a row, before it is timed.
_TEXT_TOKENS = 64
_MAP_TEXTS = 500
# The family reads 256 tokens.
_PROMPT_CHARACTERS = 80


class Plan(NamedTuple):
    """How much is measured."""

    steps: int
    """Per row, of which the host's time is measured."""
    new_tokens: int
    repeats: int


_FULL, _QUICK = Plan(256, 128, 5), Plan(64, 32, 2)


def run(options: Options) -> Report:
    """Time the host alone, then decode with and without a map in turn.

    Args:
        options: quick: a quarter of the steps, and two repeats.

    Returns:
        The report.

    Raises:
        FileNotFoundError: ../shared does not exist.
    """
    plan = _QUICK if options.quick else _FULL
    rows = [*_host_rows("gpt2", "llama2", plan), *_host_rows("llama2", "gpt2", plan)]
    rows += _speed_rows(plan)
    shapes = {"steps": plan.steps, "new tokens": plan.new_tokens, "batches": list(BATCHES)}
    return Report(rows, dtype="float32", shapes=shapes)


def _host_rows(base_name: str, value_name: str, plan: Plan) -> Iterator[Row]:
    """Milliseconds per step between the device's tokens and what the value network reads."""
    tokenizers = [load_tokenizer(SHARED / "tokenizers" / name) for name in (base_name, value_name)]
    base, value = (TextCodec(each, describe_tokenizer(each)) for each in tokenizers)
    pairs = pair_special_tokens(base.info, value.info, base_name=base_name, value_name=value_name)
    own = make_own_vocabulary(
        base,
        value,
        pairs,
        name=value_name,
        context=_TEXT_TOKENS + 4 * plan.steps,
        tokenizer=tokenizers[1],
        chat_template="plain",
        value_stop_ids=(),
    )
    length = _TEXT_TOKENS + plan.steps
    texts = _gsm8k()
    ids = np.concatenate(tokenise(tokenizers[0], texts[: len(texts) // 4]))
    for batch in BATCHES:
        rows = [ids[row * length : (row + 1) * length].tolist() for row in range(batch)]
        yield Row(
            f"{base_name} read as {value_name}, batch {batch}: host time per step",
            Figures.of(_step_times(own, rows)),
            "ms",
            target=Target("median", MOST_HOST_TIME) if batch == BATCHES[-1] else None,
        )


def _step_times(own: OwnVocabulary, texts: list[list[int]]) -> list[float]:
    """Milliseconds of each step, all rows together."""
    reader, rows = TextReader([own], batch=len(texts)), range(len(texts))
    for row, ids in enumerate(texts):
        reader.admit(row, [own.read_prompt(ids[:_TEXT_TOKENS], None)])
    reader.own_tokens(rows, size=len(rows))
    steps = itertools.count(_TEXT_TOKENS)

    def step() -> None:
        place = next(steps)
        reader.push({row: [texts[row][place]] for row in rows})
        reader.own_tokens(rows, size=len(rows))

    number = len(texts[0]) - _TEXT_TOKENS - 1
    timing = time_in_turn({"step": step}, repeats=number)["step"]
    return [1e3 * seconds for seconds in timing.seconds]


def _speed_rows(plan: Plan) -> Iterator[Row]:
    """Tokens per second of the family through a map, and in one vocabulary."""
    base, value = (load_language_model(family_folder(name)) for name in ("L", "X"))
    models = {
        "map": compose(base, value, strengths=0.1, maps=_family_map(base, value)),
        "one vocabulary": compose(base, _in_vocabulary_of(base, value), strengths=0.1),
    }
    options = GenerationOptions(max_new_tokens=plan.new_tokens, temperature=1.0)
    for batch in BATCHES:
        prompts = [text[:_PROMPT_CHARACTERS] for text in _gsm8k()[:batch]]
        decode = {
            name: functools.partial(model.generate, prompts, options)
            for name, model in models.items()
        }
        times = time_in_turn(decode, repeats=plan.repeats)
        rates = {
            # Each call generates the same tokens: their seed is the same.
            name: times[name].rate(sum(len(one.token_ids) for one in again()))
            for name, again in decode.items()
        }
        yield Row(
            f"L + X through a map, batch {batch}",
            rates["map"],
            "tokens/s",
            "higher",
            peer=Peer("the same sizes in one vocabulary", rates["one vocabulary"].median),
        )


def _family_map(base: LanguageModel, value: LanguageModel) -> DescribedMap:
    first = named_tokenizer("L", base.tokenizer, str(family_folder("L")))
    second = named_tokenizer("X", value.tokenizer, str(family_folder("X")))
    texts = _gsm8k()[:_MAP_TEXTS]
    built = build_from_rows(
        first,
        second,
        tokenise(first.tokenizer, texts),
        tokenise(second.tokenizer, texts),
        method="bytes",
        special_pairs=pair_special_tokens(first.info, second.info, base_name="L", value_name="X"),
    )
    return DescribedMap(built.vocabulary_map, built.metadata, "")


def _in_vocabulary_of(base: LanguageModel, value: LanguageModel) -> LanguageModel:
    """A network as large as the value network, with random weights in the base's vocabulary."""
    arch = dataclasses.replace(value.arch, vocab_size=base.arch.vocab_size)
    params = jax.jit(lambda key: init_params(arch, key))(jax.random.key(0))
    return dataclasses.replace(base, arch=arch, params=params)


def _gsm8k() -> list[str]:
    lines = (SHARED / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"{row['question']}\n{row['answer']}\n" for row in map(json.loads, lines)]
