"""A seeded sample of altered files: no traceback, no hang, and every error names its file."""

from itertools import islice

import pytest

from tests.fuzz.mutate import mutations
from tests.fuzz.readers import READERS
from tests.fuzz.trial import run_trial


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_an_altered_file_is_read_or_refused_by_its_name(name: str) -> None:
    trial = run_trial(name, inputs=20, seed=1)
    assert not trial.faults, "\n".join(
        f"{one.what} in {one.content[:500]!r}" for one in trial.faults
    )
    never_refused = ("rows.jsonl", "run/metrics.jsonl", "checkpoint/manifest.json")
    mended = name in never_refused or name.startswith(("cache", "remembered"))
    assert trial.outcomes["refused"] or mended


def test_the_inputs_are_the_same_for_a_seed() -> None:
    sound = [b'{"a": [1, {"b": null}]}']

    def first(seed: str) -> list[bytes]:
        return list(islice(mutations(sound, "json", seed), 50))

    assert first("x") == first("x") != first("y")
