"""The page's sections say what was measured, and what was not."""

from benchmarks.page import section


def test_a_section_says_what_was_skipped() -> None:
    record = {
        "rows": [],
        "setting": {
            "shapes": {"ngram": {"batch": 1}},
            "dtype": {"ngram": "float32"},
            "load_average": 0.5,
            "threads": 2,
            "quick": False,
        },
    }
    assert "Skipped" not in section("ngram", record)
    skipped = {"ngram, the peer": "it is not installed"}
    found = section("ngram", record | {"skipped": skipped}).splitlines()
    assert found[-1] == "Skipped: ngram, the peer: it is not installed."
