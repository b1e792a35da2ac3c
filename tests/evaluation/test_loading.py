import dataclasses

import pytest

from ivl_jax.config import ComposedModelConfig, ConfigError, RuntimeConfig
from ivl_jax.config.files import field_types
from ivl_jax.evaluation import loading
from ivl_jax.evaluation.flags import ModelFlags
from ivl_jax.evaluation.loading import find_sources

# Where arrays lie and programs are kept changes no figure; value folders name their connection, and
# the model of an adapter by its fingerprint.
FREE = {"mesh", "base_layout", "value_layout", "compilation_cache", "connection", "value_model"}
POLICY = {"strength_policy", "policy_scale"}
DRAFT = {"draft", "draft_length"}


def test_every_flag_that_decides_figures_is_recorded_with_them(stories260k_dir):
    composed = ComposedModelConfig(base=str(stories260k_dir), int8_base=True)
    drafted = dataclasses.replace(composed, draft=str(stories260k_dir))
    policy = dataclasses.replace(composed, strength_policy="kl", policy_scale=2.0)
    recorded = find_sources(ModelFlags(composed)).to_json()
    assert find_sources(ModelFlags(policy)).to_json().keys() - recorded.keys() == POLICY
    assert field_types(ModelFlags).keys() - FREE - DRAFT - POLICY <= recorded.keys()
    assert recorded["int8_base"] is True
    assert find_sources(ModelFlags(drafted)).to_json().keys() - recorded.keys() >= DRAFT


def test_compiled_programs_are_kept_where_the_flag_says(monkeypatch):
    said = []
    monkeypatch.setattr(loading, "use_compilation_cache", said.append)
    flags = ModelFlags(ComposedModelConfig(base="absent"), runtime=RuntimeConfig("/somewhere"))
    with pytest.raises(FileNotFoundError):
        find_sources(flags)
    assert said == ["/somewhere"]


def test_a_strength_that_is_not_a_number_is_refused_before_any_folder_is_looked_for():
    with pytest.raises(ConfigError, match="--strength must be finite, got nan"):
        ComposedModelConfig(base="absent", value=("absent",), strength=(float("nan"),))


def test_one_of_several_processes_is_refused_before_any_folder_is_looked_for(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ConfigError, match="runs in one process, and this is one of 4: start it"):
        find_sources(ModelFlags(ComposedModelConfig(base="absent")))
