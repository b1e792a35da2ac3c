"""A function runs in a process of its own, with variables of its own."""

import os

import pytest

from benchmarks.fresh_process import in_fresh_process


def test_result_comes_from_another_process_with_the_given_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("IVL_TEST_NEW", raising=False)
    monkeypatch.setenv("IVL_TEST_OLD", "before")
    environment = {"IVL_TEST_NEW": "1", "IVL_TEST_OLD": "2"}
    assert in_fresh_process(os.getpid, {}) != os.getpid()
    assert in_fresh_process(os.getenv, environment, "IVL_TEST_NEW") == "1"
    assert in_fresh_process(os.getenv, environment, "IVL_TEST_OLD") == "2"
    assert "IVL_TEST_NEW" not in os.environ
    assert os.environ["IVL_TEST_OLD"] == "before"


def test_errors_come_back() -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        in_fresh_process(os.stat, {}, "absent")
