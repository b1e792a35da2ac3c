import dataclasses

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.evaluation.flags import ModelFlags
from ivl_jax.evaluation.loading import find_sources

# Where arrays lie changes no figure.
LAYOUT = {"mesh", "base_layout", "value_layout"}


def test_every_flag_that_decides_figures_is_recorded_with_them(stories260k_dir):
    recorded = find_sources(ModelFlags(base=str(stories260k_dir), int8_base=True)).to_json()
    flags = {field.name for field in dataclasses.fields(ModelFlags)}
    assert flags - LAYOUT <= recorded.keys()
    assert recorded["int8_base"] is True


def test_a_strength_that_is_no_number_is_refused_before_any_folder_is_looked_for():
    with pytest.raises(ConfigError, match="--strength must be finite, got nan"):
        find_sources(ModelFlags(base="absent", value=("absent",), strength=(float("nan"),)))
