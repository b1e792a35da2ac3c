"""The harness model's arguments, and the command that hands them to the real lm_eval."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval, datasets and their dependencies


def test_model_arguments_name_values_with_their_strengths(lm_eval, stories260k_dir, value_folder):
    from ivl_jax.evaluation.harness import IvlLM

    arguments = f"base={stories260k_dir},value={value_folder},strength=0.3,tensor=1"
    model = IvlLM.create_from_arg_string(arguments, {"batch_size": "auto", "device": "cuda:0"})
    assert model.model.strengths == (0.3,)
    assert model.batch_size == 16
    info = model.get_model_info()
    assert info["value"] == [str(value_folder)]
    assert re.fullmatch("[0-9a-f]{64}", info["base_fingerprint"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "--base is missing"),
        ({"base": "./absent"}, "./absent: no such folder"),
        ({"base": "BASE", "values": "x"}, "unknown key values; did you mean value?"),
        ({"base": "BASE", "dtype": "float64"}, "dtype must be one of float32, bfloat16, float16"),
        ({"base": "BASE", "batch_size": "many"}, "batch_size: expected a number ≥ 1 or auto"),
        ({"base": "BASE", "value": "FUTURE"}, "format_version 99, this version of ivl_jax reads 1"),
        ({"base": "BASE", "value": ["a", "b"], "strength": 1}, "strength is given 1 time"),
        ({"base": "BASE", "chat_template": "nonsense"}, "nonsense"),
        ({"base": "BASE", "max_length": 9999}, "max_length = 9999: expected 1 to 512 tokens"),
        ({"base": "BASE", "tensor": 9}, "9"),
    ],
    ids=lambda case: str(case)[:60],
)
def test_model_arguments_that_name_no_model_are_refused_before_one_is_loaded(
    lm_eval, stories260k_dir, tmp_path, monkeypatch, arguments, said
):
    from ivl_jax.evaluation.harness import IvlLM, ModelArgumentsError

    def fail(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ivl_jax.composed.sources.ModelSource.load", fail)
    (tmp_path / "ivl.json").write_text('{"format_version": 99}')
    places = {"BASE": str(stories260k_dir), "FUTURE": str(tmp_path)}
    arguments = {k: places.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(ModelArgumentsError, match=re.escape(said)):
        IvlLM.create_from_arg_obj(arguments)


def test_the_command_hands_its_arguments_to_the_harness(lm_eval, monkeypatch, capsys):
    from ivl_jax.evaluation.__main__ import main
    from ivl_jax.evaluation.harness import ModelArgumentsError

    seen = []

    def cli_evaluate():
        seen.append(sys.argv)
        raise ModelArgumentsError("no such model")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli_evaluate)
    before = list(sys.argv)
    assert main(["lm-eval", "run", "--model", "ivl", "--tasks", "x"]) == 2
    assert main(["lm-eval", "run", "--include_path", "mine"]) == main(["lm-eval", "ls"]) == 2
    assert seen[1:] == [["lm-eval", "run", "--include_path", "mine"], ["lm-eval", "ls"]]
    assert seen[0][:6] == ["lm-eval", "run", "--model", "ivl", "--tasks", "x"]
    assert seen[0][6] == "--include_path"
    assert (Path(seen[0][7]) / "humaneval_n20.yaml").is_file()
    assert capsys.readouterr().err == "no such model\n" * 3
    assert sys.argv == before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lm-eval", "run"]) == 2
    assert "pip install 'ivl_jax[eval]'" in capsys.readouterr().err


def test_help_imports_no_jax(project_root):
    code = (
        "import sys\nfrom ivl_jax.evaluation.__main__ import main\n"
        "try:\n    main(['gsm8k', '--help'])\n"
        "except SystemExit as end:\n    assert end.code in (0, None)\n"
        "heavy = {'jax', 'flax', 'transformers', 'lm_eval'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, check=False
    )
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"--max-new-tokens" in finished.stdout
