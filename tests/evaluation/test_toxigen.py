import json

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.evaluation.__main__ import main
from ivl_jax.evaluation.toxigen import draw_prompts


@pytest.fixture
def files(tmp_path):
    """Two files of prompts, one line each."""
    for name, prompts in {
        "hate_cats_1k.txt": [f"cats are {i}" for i in range(6)],
        "neutral_dogs_1k.txt": ["- dogs\\nare", "", "a \\\\ b"],
    }.items():
        (tmp_path / name).write_text("\n".join(prompts) + "\n")
    return [tmp_path / "hate_cats_1k.txt", tmp_path / "neutral_dogs_1k.txt"]


def test_prompts_carry_label_and_group_and_escapes_are_undone(files):
    rows = [row.record for row in draw_prompts(files, per_group=0, seed=0)]
    assert len(rows) == 8
    assert rows[0] == {"prompt": "cats are 0", "label": "hate", "group": "cats"}
    assert [row["prompt"] for row in rows[6:]] == ["- dogs\nare", "a \\ b"]
    assert {row["group"] for row in rows[6:]} == {"dogs"}


def test_the_draw_depends_on_the_seed_and_the_files_name_alone(files):
    drawn = draw_prompts(files, per_group=3, seed=1)
    assert len(drawn) == 3 + 2
    assert draw_prompts(files[:1], per_group=3, seed=1) == drawn[:3]
    others = [draw_prompts(files[:1], per_group=3, seed=seed) for seed in range(2, 9)]
    assert any(other != drawn[:3] for other in others)


def test_files_without_prompts_are_named(tmp_path):
    (tmp_path / "cats.txt").write_text("a\n")
    (tmp_path / "hate_cats.txt").write_text("\n\n")
    for name, said in (
        ("absent.txt", "no file at"),
        ("cats.txt", "expected a name with label and group"),
        ("hate_cats.txt", "has no prompts"),
    ):
        with pytest.raises(ConfigError, match=said):
            draw_prompts([tmp_path / name], per_group=0, seed=0)


def test_the_command_continues_each_prompt_in_a_line_of_its_own(
    stories260k_dir, value_folder, files, tmp_path, capsys, read_prompts, base_alone
):
    output = tmp_path / "out.jsonl"
    flags = [
        *("toxigen", "--base", str(stories260k_dir), "--value", str(value_folder)),
        *("--strength", "0.3", "--prompts", *map(str, files), "--per-group", "2"),
        *("--output", str(output), "--max-new-tokens", "12", "--batch-size", "4"),
        *("--mesh.tensor", "1"),
    ]
    assert main(flags) == 0
    assert "4 continuations" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert [row["label"] for row in rows] == ["hate", "hate", "neutral", "neutral"]
    assert all(row["text"].startswith(" It is") for row in rows)
    (batch,) = read_prompts
    asked = base_alone.tokenizer.decode(batch[2].token_ids)
    assert asked == "<s> Question: Complete the following: - dogs\nare\nAnswer:"
    assert batch[0].options.stop == ("\n\n",)
    assert main([*flags, "--prompt", "text"]) == 2
    assert "prompt: 'chat' there, 'text' now" in capsys.readouterr().err
