"""What /metrics shows can be understood and is measured finely enough."""

import re

import pytest

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from ivl_jax.config import ServeConfig
from ivl_jax.serving.metrics import Metrics


def test_every_figure_is_explained_and_times_have_room_below_and_above():
    text = Metrics().text().decode()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    explained = dict(re.findall(r"# HELP (\S+) (.*)", text))
    assert names == set(explained)
    assert all(len(help) > 20 and help.endswith(".") for help in explained.values())
    for name, least, most in [
        ("ivl_time_to_first_token_seconds", 0.01, ServeConfig().queue_seconds),
        ("ivl_time_per_token_seconds", 0.001, 1.0),
    ]:
        bounds = re.findall(rf'{name}_bucket{{le="([\d.]+)"}}', text)
        assert float(bounds[0]) < least
        assert float(bounds[-1]) >= most
