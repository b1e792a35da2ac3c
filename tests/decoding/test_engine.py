"""Refilled rows generate what their prompts alone would, and do not wait for other rows."""

import pytest

from ivl_jax.decoding import engine, prompt_groups
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.requests import GenerationOptions

PROMPTS = ["Once upon a time", "", "The big dog ran to the park and it was", "Lily said", "A"] * 2
LIMITS = (30, 3, 7, 1, 12, 25, 4, 18, 2, 9)


def options(**changes):
    return [GenerationOptions(max_new_tokens=limit, **changes) for limit in LIMITS]


def test_rows_that_are_refilled_give_what_each_prompt_alone_gives(composed):
    each = [GenerationOptions(max_new_tokens=30, stop=("e",) if i % 3 else ()) for i in range(10)]
    alone = [composed.generate([pair[0]], pair[1])[0] for pair in zip(PROMPTS, each, strict=True)]
    assert len({len(generation.token_ids) for generation in alone}) > 3
    assert {generation.finish_reason for generation in alone} == {"length", "stop_string"}
    assert composed.generate(PROMPTS, each, batch_size=4) == alone


def test_samples_depend_neither_on_the_row_nor_on_when_it_begins(composed):
    hot = options(temperature=3.0, seed=3)
    in_turn = composed.generate(PROMPTS, hot, batch_size=1)
    assert composed.generate(PROMPTS, hot, batch_size=4) == in_turn
    # The same prompts twice, other samples: a prompt's index decides.
    assert in_turn[2].token_ids[:4] != in_turn[7].token_ids[:4]


def test_a_waiting_prompt_begins_while_the_longest_row_still_runs(recorded):
    model, calls = recorded
    prepared = model.prepare(PROMPTS, options())
    decoding = model.engine(EngineLimits(max_rows=4, least_rows=4))
    ids, ended = [decoding.submit(prompt) for prompt in prepared], []
    while not decoding.idle:
        progress = decoding.step(max_tokens=100)
        ended += [ids.index(one.id) for one in progress if one.generation is not None]
    assert sorted(ended) == list(range(10))
    # The first prompt has 30 tokens; three rows have 3 + 7 + 1 + 12 + 25 + 4 + … beside it.
    assert set(ended[: ended.index(0)]) > {1, 2, 3, 4, 6}
    names = [name for name, *_ in calls]
    assert names.count("place") == 6
    assert names.count("decode_chunk") < 10


def test_generations_come_in_order_each_as_soon_as_those_before_it_are_done(composed, monkeypatch):
    looks, yielded = [], []
    step = engine.Engine.step

    def watched(self, **named):
        progress = step(self, **named)
        looks.append(len(yielded))
        return progress

    monkeypatch.setattr(engine.Engine, "step", watched)
    prepared = composed.prepare(PROMPTS, options()[::-1])
    for generation in composed.generate_prepared(prepared, batch_size=4, chunk_tokens=4):
        yielded.append(generation)
    assert [len(generation.token_ids) for generation in yielded] == list(LIMITS[::-1])
    # Nothing before the first prompt's 9 tokens; the second, which has 2, comes with it. Then
    # nothing before the third's 18, which the fourth's 4 have waited for, and so on.
    assert looks.count(0) >= 3
    assert list(dict.fromkeys(looks))[:3] == [0, 2, 4]


@pytest.mark.parametrize(
    ("limits", "rows", "capacities"),
    [
        ((100, 5, 5), 1, [128, 64]),
        ((5, 5, 100), 1, [128]),
        # The third row runs on while the first, which is long, gives its place to the fourth.
        ((100, 50, 55, 50), 2, [128, 64]),
    ],
    ids=str,
)
def test_rows_give_up_slots_once_no_prompt_needs_them(recorded, limits, rows, capacities):
    model, calls = recorded
    each = [GenerationOptions(max_new_tokens=limit) for limit in limits]
    prompts = [[1, 6 + i] for i in range(len(limits))]
    generations = model.generate(prompts, each, batch_size=rows)
    assert [len(generation.token_ids) for generation in generations] == list(limits)
    found = [named["capacity"] for name, _, named in calls if name in ("prefill", "empty")]
    # Prompts beside running rows are read into 17 slots, then put where they belong.
    assert list(dict.fromkeys(slots for slots in found if slots > 17)) == capacities
    assert ("empty" in [name for name, *_ in calls]) == (rows > 1)


def test_a_large_batch_waits_until_several_rows_are_free(recorded, monkeypatch):
    monkeypatch.setattr(prompt_groups, "_ROWS_A_REFILL", 2)  # half of the batch
    model, calls = recorded
    prompts = [[1, 6 + i] for i in range(7)]
    each = [GenerationOptions(max_new_tokens=3 + 2 * i) for i in range(7)]
    assert [g.prompt_tokens for g in model.generate(prompts, each, batch_size=4)] == [2] * 7
    enough = [int(arguments[4]) for name, arguments, _ in calls if name == "decode_chunk"]
    assert enough[0] == 2
    assert enough[-1] == 4
    # Three prompts wait: two together, then one beside a row that only fills the group.
    admitted = [arguments[2].tolist() for name, arguments, _ in calls if name == "place"]
    assert admitted == [[0, 1], [2, 4]]


def test_no_prompts_take_no_rows(recorded):
    model, calls = recorded
    assert model.generate([]) == []
    assert calls == []
