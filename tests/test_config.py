"""Configs are read strictly, checked, and written back to equal configs."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_jax.config import (
    BaseConfig,
    ConfigError,
    DataConfig,
    InferConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
    check_train_config,
)
from ivl_jax.config_files import config_from_mapping, config_to_toml, load_config

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_can_start(path: Path) -> None:
    config = load_config(path)
    check_train_config(config)
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"configs/{path.name}" in first_line or "make demo" in first_line
    assert (config.run_dir + "/").startswith(f"runs/{path.stem}/")


def test_the_papers_recipe_is_what_the_papers_configs_say() -> None:
    folder = CONFIGS[0].parent
    plain = load_config(folder / "tinyllama_sharegpt.toml")
    penalised = load_config(folder / "tinyllama_sharegpt_l1.toml")
    infinity = load_config(folder / "tinyllama_infinity_instruct.toml")
    assert (plain.optimizer.learning_rate, plain.step.batch_size, plain.step.epochs) == (
        1e-4,
        32,
        3,
    )
    assert (plain.optimizer.weight_decay, plain.optimizer.warmup_fraction) == (0.01, 0.01)
    assert plain.penalty.kind == "none"
    assert penalised.penalty == PenaltyConfig(kind="l1", weight=1.0)
    assert (infinity.optimizer.learning_rate, infinity.step.batch_size) == (5e-6, 512)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")),
    number=st.floats(1e-12, 1e3),
    steps=st.integers(1, 10**9),
    paths=st.lists(st.text("abc/.\"'\\ é")),
)
def test_toml_round_trip_gives_an_equal_config(
    text: str, number: float, steps: int, paths: list[str]
) -> None:
    import tomllib

    config = TrainConfig(
        run_dir=text,
        base=BaseConfig(path=text, revision=None),
        bases=tuple(BaseConfig(path=path, weight=number) for path in paths),
        data=DataConfig(train=tuple(paths)),
        optimizer=OptimizerConfig(learning_rate=number),
        step=StepConfig(max_steps=steps),
    )
    document = tomllib.loads(config_to_toml(config))
    assert config_from_mapping(document, TrainConfig) == config


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"optimizer": {"learningrate": 1.0}},
            "optimizer.learningrate; did you mean optimizer.learning_rate",
        ),
        ({"optimiser": {}}, "unknown key optimiser; did you mean optimizer"),
        ({"seed": "one"}, "seed must be int, got 'one'"),
        ({"seed": True}, "seed must be int, got True"),
        ({"data": {"train": "a.jsonl"}}, "data.train must be a list"),
        ({"data": {"train": ["a", 2]}}, r"data.train\[1\] must be str, got 2"),
        ({"method": "lora"}, "method must be one of value, sft; got 'lora'"),
        ({"data": "x"}, "data must be a table"),
        ({"bases": ["x"]}, r"bases\[0\] must be a table"),
        ({"bases": [{"path": "a"}, {"pth": "b"}]}, r"bases\[1\].pth; did you mean .*\.path"),
        ({"bases": [{"path": "a", "weight": 0}]}, "weight must be > 0"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate must be > 0, got -1.0"),
    ],
)
def test_a_wrong_entry_is_named_with_its_place(document: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config_from_mapping(document, TrainConfig, where="my.toml")
    assert str(error.value).startswith("my.toml: ")


def test_a_missing_config_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text("seed = 1\n")
    with pytest.raises(ConfigError, match=r"no config file at .*wrong.toml; beside it .*real.toml"):
        load_config(tmp_path / "wrong.toml")
    (tmp_path / "broken.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "broken.toml")
    assert load_config(tmp_path / "real.toml").seed == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: ValueConfig(init="base", path="x"),
        lambda: ValueConfig(connection="linear", init="scratch", path="x"),
        lambda: ValueConfig(connection="linear"),
        lambda: ValueConfig(path="x", rank=4),
        lambda: BaseConfig(weight=float("inf")),
        lambda: DataConfig(validation_fraction=1.0),
        lambda: DataConfig(max_malformed_fraction=2.0),
        lambda: DataConfig(max_length=1),
        lambda: DataConfig(format="fields"),
        lambda: DataConfig(user_template="{question}"),
        lambda: PenaltyConfig(weight=-1.0),
        lambda: OptimizerConfig(beta1=1.0),
        lambda: OptimizerConfig(warmup_fraction=1.5),
        lambda: OptimizerConfig(weight_decay=-0.1),
        lambda: MeshConfig(data=-1, fsdp=-1),
        lambda: MeshConfig(tensor=0),
        lambda: StepConfig(batch_size=8, micro_batches=3),
        lambda: StepConfig(epochs=0.0),
        lambda: InferConfig(temperature=-0.1),
        lambda: InferConfig(temperature=float("inf")),
        lambda: InferConfig(strength=(1.0, float("nan"))),
        lambda: InferConfig(seed=-1),
        lambda: InferConfig(top_p=0.0),
        lambda: InferConfig(min_p=1.0),
    ],
)
def test_fields_that_contradict_each_other_are_refused(build) -> None:
    with pytest.raises(ConfigError):
        build()


def test_all_missing_fields_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_train_config(TrainConfig())
    for name in ("run_dir", "base.path", "data.train", "value.path"):
        assert name in str(error.value)
    complete = TrainConfig(
        run_dir="r", base=BaseConfig(path="b"), data=DataConfig(train=("d",)), method="sft"
    )
    check_train_config(complete)
    check_train_config(
        dataclasses.replace(complete, method="value", value=ValueConfig(init="base"))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": BaseConfig(path="a")}, "has no use beside"),
        ({"bases": (BaseConfig(path="b"), BaseConfig())}, r"bases\[1\].path is empty"),
        ({"bases": (BaseConfig(path="b"), BaseConfig(path="b"))}, "names b twice"),
        (
            {"distributed": True, "bases": (BaseConfig(path="b", cache_states=True),)},
            "needs distributed = false",
        ),
        ({"method": "sft"}, "fine-tunes one model"),
        (
            {"method": "sft", "bases": (), "base": BaseConfig(path="a", cache_states=True)},
            "base.cache_states has no use",
        ),
        (
            {"method": "sft", "bases": (), "base": BaseConfig(path="a", param_dtype="int8")},
            "base.param_dtype = .int8. has no use",
        ),
    ],
)
def test_several_bases_are_said_in_one_way(change: dict, message: str) -> None:
    config = TrainConfig(
        run_dir="r",
        bases=(BaseConfig(path="b"), BaseConfig(path="c")),
        data=DataConfig(train=("d",)),
        value=ValueConfig(connection="linear", init="scratch"),
    )
    check_train_config(config)
    with pytest.raises(ConfigError, match=message):
        check_train_config(dataclasses.replace(config, **change))
