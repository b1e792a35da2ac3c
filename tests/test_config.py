"""Configs are read strictly, checked, and written back to equal configs."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.command_line.flags import parse_flags
from ivl_jax.config import (
    AugmentationConfig,
    BaseConfig,
    ComposedModelConfig,
    ConfigError,
    DataConfig,
    GenerationOptions,
    InferConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    ProcessesConfig,
    RowsConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
    check_train_config,
    config_from_mapping,
    config_to_toml,
    load_config,
    strength_problem,
    unused_options,
)

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_can_start(path: Path) -> None:
    config = load_config(path)
    check_train_config(config)
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"configs/{path.name}" in first_line or "make demo" in first_line
    assert (config.run_dir + "/").startswith(f"runs/{path.stem}/")


def test_no_shipped_config_has_an_option_without_effect() -> None:
    assert {path.name: unused_options(load_config(path)) for path in CONFIGS} == {
        path.name: [] for path in CONFIGS
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grpo": {"clip_low": 0.1, "clip_high": 0.3}}, "grpo.clip_low = 0.1, grpo.clip_high"),
        ({"grpo": {"clip_low": 0.1, "updates": 2}}, None),
        ({"distil": {"teacher": "t", "temperature": 0.7}}, "distil.temperature = 0.7 has"),
        ({"distil": {"teacher": "t", "temperature": 0.7, "answers": "sampled"}}, None),
        (
            {"objective": "dpo", "grpo": {"rewards": ["contains"], "group_size": 4}},
            'grpo.rewards = ["contains"], grpo.group_size = 4 have no effect with objective =',
        ),
        ({"objective": "sft", "preference": {"loss": "ipo"}}, 'preference.loss = "ipo" has'),
        ({"objective": "sft", "distil": {"tokens": "all"}}, 'distil.tokens = "all" has'),
        ({"objective": "mine:OBJECTIVE", "grpo": {"group_size": 4}}, None),
        ({"method": "sft", "penalty": {"weight": 0.5}}, "penalty.weight = 0.5 has"),
        ({"method": "sft", "penalty": {"kind": "none", "weight": 0.5}}, None),
        ({"method": "value", "penalty": {"weight": 0.5}}, None),
        (
            {"penalty": {"kind": "none", "schedule": "linear_decay"}},
            'penalty.schedule = "linear_decay" has no effect with no penalty',
        ),
        ({"penalty": {"schedule": "linear_decay"}}, None),
        ({"method": "sft"}, None),  # the defaults are nobody's choice
    ],
)
def test_options_without_effect_are_named(changes, named) -> None:
    objective = next((table for table in ("grpo", "distil") if table in changes), "sft")
    config = config_from_mapping({"objective": objective} | changes)
    found = unused_options(config)
    assert len(found) == (named is not None)
    assert named is None or named in found[0]
    assert unused_options(config_from_mapping({"objective": config.objective})) == []


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


@settings(deadline=None)  # the machine may be busy with other tests
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
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
    with pytest.raises(
        ConfigError, match=r"no config file at .*wrong.toml; this folder has.*real.toml"
    ):
        load_config(tmp_path / "wrong.toml")
    (tmp_path / "broken.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"broken.toml, line 1, column 8: not TOML"):
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
        lambda: RowsConfig(max_malformed_fraction=2.0),
        lambda: DataConfig(max_length=1),
        lambda: PenaltyConfig(weight=-1.0),
        lambda: AugmentationConfig(base_temperature=0.5),
        lambda: AugmentationConfig(base_temperature=float("inf")),
        lambda: AugmentationConfig(base_dropout=1.0),
        lambda: AugmentationConfig(base_dropout=-0.1),
        lambda: OptimizerConfig(beta1=1.0),
        lambda: OptimizerConfig(warmup_fraction=1.5),
        lambda: OptimizerConfig(weight_decay=-0.1),
        lambda: MeshConfig(data=-1, fsdp=-1),
        lambda: MeshConfig(tensor=0),
        lambda: ProcessesConfig(coordinator_address="host"),
        lambda: ProcessesConfig(coordinator_address=":8476"),
        lambda: ProcessesConfig(num_processes=-1),
        lambda: ProcessesConfig(process_id=-1),
        lambda: ProcessesConfig(num_processes=2, process_id=2),
        lambda: ProcessesConfig(heartbeat_timeout=1),
        lambda: ProcessesConfig(shutdown_timeout=0),
        lambda: StepConfig(batch_size=8, micro_batches=3),
        lambda: StepConfig(epochs=0.0),
        lambda: InferConfig(batch_size=0),
        lambda: ComposedModelConfig(strength=(1.0, float("nan"))),
        lambda: ComposedModelConfig(draft_length=33),
        lambda: GenerationOptions(temperature=-0.1),
        lambda: GenerationOptions(temperature=float("inf")),
        lambda: GenerationOptions(seed=-1),
        lambda: GenerationOptions(top_p=0.0),
        lambda: GenerationOptions(min_p=1.0),
        lambda: GenerationOptions(stop=("",)),
        lambda: GenerationOptions(logit_bias={5: 100.5}),
        lambda: GenerationOptions(logit_bias={5: 0, 6: float("nan")}),
        lambda: GenerationOptions(logit_bias=dict.fromkeys(range(301), 1)),
    ],
)
def test_fields_that_contradict_each_other_are_refused(build) -> None:
    with pytest.raises(ConfigError):
        build()


def test_training_in_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"loss scaling.*bfloat16.*float32"):
        StepConfig(compute_dtype="float16")
    assert ComposedModelConfig(dtype="float16").dtype == "float16"


def test_processes_are_a_switch_and_a_table_of_details() -> None:
    assert config_from_mapping({"distributed": True}).processes == ProcessesConfig()
    table = {"coordinator_address": "[::1]:8476", "num_processes": 2, "heartbeat_timeout": 20}
    config = config_from_mapping({"distributed": True, "processes": table})
    assert config.processes == ProcessesConfig("[::1]:8476", 2, heartbeat_timeout=20)
    with pytest.raises(ConfigError, match=r"did you mean processes.process_id"):
        config_from_mapping({"processes": {"processid": 1}})


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
        ({"base": BaseConfig(path="a")}, "cannot be combined with"),
        ({"bases": (BaseConfig(path="b"), BaseConfig())}, r"bases\[1\].path is empty"),
        ({"bases": (BaseConfig(path="b"), BaseConfig(path="b"))}, "names b more than once"),
        (
            {"distributed": True, "bases": (BaseConfig(path="b", cache_states=True),)},
            "needs distributed = false",
        ),
        ({"method": "sft"}, "fine-tunes one model"),
        (
            {"method": "sft", "bases": (), "base": BaseConfig(path="a", cache_states=True)},
            "base.cache_states cannot be combined",
        ),
        (
            {"method": "sft", "bases": (), "base": BaseConfig(path="a", param_dtype="int8")},
            "base.param_dtype = .int8. cannot be combined",
        ),
        (
            {
                "method": "sft",
                "bases": (),
                "base": BaseConfig(path="a"),
                "augmentation": AugmentationConfig(base_dropout=0.1),
            },
            "augmentation.base_dropout = 0.1 cannot be combined",
        ),
    ],
)
def test_several_bases_are_given_in_one_way(change: dict, message: str) -> None:
    config = TrainConfig(
        run_dir="r",
        bases=(BaseConfig(path="b"), BaseConfig(path="c")),
        data=DataConfig(train=("d",)),
        value=ValueConfig(connection="linear", init="scratch"),
    )
    check_train_config(config)
    with pytest.raises(ConfigError, match=message):
        check_train_config(dataclasses.replace(config, **change))


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("optimizer", "max_gradient_norm"),
        ("optimizer", "epsilon"),
        ("optimizer", "learning_rate"),
        ("step", "epochs"),
        ("penalty", "weight"),
        ("base", "weight"),
        ("data", "validation_fraction"),
        ("data", "max_malformed_fraction"),
    ],
)
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan], ids=str)
def test_a_number_that_is_not_finite_is_refused_from_file_and_command_line(
    table: str, key: str, number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"my.toml: {table}.{key} must be finite, got {number}"):
        config_from_mapping({table: {key: number}}, where="my.toml")
    flag = f"--{table}.{key.replace('_', '-')}"
    with pytest.raises(SystemExit):
        parse_flags(TrainConfig, [f"{flag}={number}"], prog="train.py")
    assert f"{key} must be finite, got {number}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[optimizer]\nmax_gradient_norm = inf\n", "optimizer.max_gradient_norm must be finite"),
        (b"[step]\nepochs = nan\n", "step.epochs must be finite, got nan"),
        (b"seed = 99999999999999999999999\n", "seed must be an integer of at most 64 bits"),
        (b"x = " + b"9" * 5000, "line 1: x: an integer of more than 4300 digits"),
        ("seed = 1".encode("utf-16"), "line 1: byte 0: not UTF-8 (it begins as UTF-16 does)"),
        ("# Größe\n".encode("latin-1"), "line 1: byte 4: not UTF-8 (found 0xf6)"),
        (b"a = " + b"[" * 9999, "not TOML: nested too deeply"),
        (b"[step\n", "line 1, column 6: not TOML"),
    ],
    ids=lambda part: part[:16] if isinstance(part, str) else "",
)
def test_whatever_a_config_file_holds_the_error_names_file_and_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_integers_beyond_64_bits_are_refused_by_key() -> None:
    with pytest.raises(
        ConfigError, match=r"c: seed must be an integer of at most 64 bits, got an integer of 77"
    ):
        config_from_mapping({"seed": 10**23}, where="c")
    with pytest.raises(ConfigError, match=r"seed must be in \[0, 2³²\), got 4294967296"):
        TrainConfig(seed=2**32)
    with pytest.raises(ConfigError, match=r"step\.max_steps must be an integer of at most 64 bits"):
        StepConfig(max_steps=10**5000)


@pytest.mark.parametrize("alpha", [1e38, -10_001.0, 1e4 + 1])
def test_a_strength_beyond_the_bound_is_refused_and_the_bound_is_stated(alpha: float) -> None:
    for build in (
        lambda: ComposedModelConfig(strength=(1.0, alpha)),
        lambda: GenerationOptions(strengths=(alpha,)),
    ):
        with pytest.raises(ConfigError, match="must be between -10,000 and 10,000, "):
            build()
    ComposedModelConfig(strength=(-1e4, 1e4))
    # JSON has integers that no float holds, and some that Python refuses to write.
    for whole in (10**400, 10**5000):
        assert "got an integer of" in str(strength_problem(whole))


def test_configs_import_neither_jax_nor_the_parser_of_flags() -> None:
    code = (
        "import sys, ivl_jax.config\n"
        "sys.exit(str({'jax', 'tyro', 'numpy', 'rich'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
