"""No test is left out where the extra that it needs has to be installed.

`IVL_REQUIRED_EXTRAS` lists those extras (`.ci/run` sets it). Elsewhere a test, or the doctests of a
module, are skipped with a reason where their extra is missing.
"""

import os
import re
from collections.abc import Generator
from typing import TypeVar

import pytest

ReportT = TypeVar("ReportT", pytest.TestReport, pytest.CollectReport)

_REQUIRED = frozenset(os.environ.get("IVL_REQUIRED_EXTRAS", "").replace(",", " ").split())
_MISSING_EXTRA = re.compile(r"the extra `([\w-]+)` is not installed")
_NO_IMPORT = "unable to import module"  # what pytest says of a module with doctests


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Refuse the skip of a test."""
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Refuse the skip of a module."""
    return _refuse_skip((yield))


def _refuse_skip(report: ReportT) -> ReportT:
    if not (_REQUIRED and report.skipped and isinstance(report.longrepr, tuple)):
        return report
    path, line, reason = report.longrepr
    missing = _MISSING_EXTRA.search(reason)
    if (missing and missing[1] in _REQUIRED) or _NO_IMPORT in reason:
        report.outcome = "failed"
        report.longrepr = (
            f"{path}:{line}: {reason}; IVL_REQUIRED_EXTRAS={','.join(sorted(_REQUIRED))}"
        )
    return report
