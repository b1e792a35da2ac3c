"""Decoding with a value network of another vocabulary: host time, and tokens per second.

In: GSM8K and two tokenizers under ../shared; the embedded family. Out: what re-tokenising alone
costs per step at several batches; then tokens per second and whole steps of L with X through a map,
compared with the same sizes in one vocabulary, the difference split.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import PROJECT_ROOT
from benchmarks.timing import Figures, Timing, time_in_turn
from ivl_jax.assets import family_folder
from ivl_jax.composed.forward import OwnTokens
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.model import ComposedModel
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


# What is timed, its model, and tokens between two looks of the host.
_RUNS = (
    ("map", "map", 1),
    ("a look every token", "one vocabulary", 1),
    ("one vocabulary", "one vocabulary", 16),
)


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
            f"{base_name} read as {value_name}, batch {batch}: re-tokenising alone per step",
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
        texts = [text[:_PROMPT_CHARACTERS] for text in _gsm8k()[:batch]]
        runs = {
            name: functools.partial(_decode, models[model], texts, options, chunk)
            for name, model, chunk in _RUNS
        }
        times = time_in_turn(runs, repeats=plan.repeats)
        lengths = {name: [len(one.token_ids) for one in again()] for name, again in runs.items()}
        rates = {name: times[name].rate(sum(lengths[name])) for name in runs}
        yield Row(
            f"L + X through a map, batch {batch}",
            rates["map"],
            "tokens/s",
            "higher",
            peer=Peer("the same sizes in one vocabulary", rates["one vocabulary"].median),
        )
        yield from _split_rows(runs["map"], times, lengths, batch=batch)


def _decode(
    model: ComposedModel, texts: list[str], options: GenerationOptions, chunk: int
) -> list[Generation]:
    """Decode all texts in one batch."""
    prepared = model.prepare(texts, options)
    return list(model.generate_prepared(prepared, batch_size=len(texts), chunk_tokens=chunk))


def _split_rows(
    mapped: Callable[[], list[Generation]],
    times: Mapping[str, Timing],
    lengths: Mapping[str, list[int]],
    *,
    batch: int,
) -> Iterator[Row]:
    """Milliseconds of whole steps, prompts included, and what a map adds to them."""
    # All rows begin together: there are as many steps as the longest row has tokens.
    steps = {
        name: Figures.of(1e3 * seconds / max(lengths[name]) for seconds in timing.seconds)
        for name, timing in times.items()
    }
    host, widths = _host_part(mapped)
    host_step = 1e3 * host / max(lengths["map"])
    looked = steps["a look every token"].median
    parts = {
        "exchange: a look at every token": looked - steps["one vocabulary"].median,
        "re-tokenising on the host": host_step,
        "wider value network and its own program": steps["map"].median - looked - host_step,
    }
    for name, _, _ in _RUNS:
        yield Row(f"step, {name}, batch {batch}", steps[name], "ms")
    for name, part in parts.items():
        yield Row(f"of which {name}, batch {batch}", Figures.of([part]), "ms")
    for width, count in sorted(Counter(widths).items()):
        share = 100 * count / len(widths)
        yield Row(f"steps of {width} own tokens, batch {batch}", Figures.of([share]), "%")


def _host_part(decode: Callable[[], object]) -> tuple[float, list[int]]:
    """Seconds that the host re-tokenises in one decode, and the width of each step."""
    seconds, widths, push, own_tokens = [], list[int](), TextReader.push, TextReader.own_tokens

    def timed_push(reader: TextReader, new_ids: Mapping[int, Sequence[int]]) -> set[int]:
        started = time.perf_counter()
        full = push(reader, new_ids)
        seconds.append(time.perf_counter() - started)
        return full

    def timed_tokens(
        reader: TextReader, rows: Sequence[int], *, size: int, at_most: int | None = None
    ) -> tuple[OwnTokens, ...]:
        started = time.perf_counter()
        own = own_tokens(reader, rows, size=size, at_most=at_most)
        seconds.append(time.perf_counter() - started)
        widths.extend(one.tokens.shape[1] for one in own)
        return own

    with (
        mock.patch.object(TextReader, "push", timed_push),
        mock.patch.object(TextReader, "own_tokens", timed_tokens),
    ):
        decode()
    return sum(seconds), widths[1:]  # the first one is the prompts


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
