"""A generation that ended with an error is never scored or judged as if it were an answer."""

import json

import pytest

from ivl_jax.decoding.generation import Generation, GenerationError
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.__main__ import main

ERROR = "the logits of value network 1 are not finite"


@pytest.fixture
def failing(monkeypatch):
    """The second of all prompts ends with an error; nothing is computed."""

    def generate_prepared(self, prompts, **_):
        for index, prompt in enumerate(prompts):
            error = ERROR if index == 1 else None
            reason = "error" if error else "eos"
            yield Generation(f" It is {index}.", (5,), reason, len(prompt.token_ids), error)

    monkeypatch.setattr(ComposedModel, "generate_prepared", generate_prepared)


@pytest.mark.parametrize(
    ("command", "flag", "rows", "written"),
    [
        ("gsm8k", "--data", [{"question": "2 + 3?", "answer": "#### 5"}] * 3, 1),
        ("toxigen", "--prompts", "One\nTwo\nThree\n", 1),
        # Questions are written when all turns of a batch are answered.
        (
            "mt-bench",
            "--questions",
            [{"question_id": i, "category": "math", "turns": ["Hello"]} for i in (1, 2)],
            0,
        ),
    ],
)
def test_an_evaluation_fails_and_names_the_item(
    stories260k_dir, value_folder, failing, tmp_path, capsys, command, flag, rows, written
):
    items, output = tmp_path / "hate_women.txt", tmp_path / "out.jsonl"
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    items.write_text(text)
    status = main(
        [
            *(command, "--base", str(stories260k_dir), "--value", str(value_folder)),
            *(flag, str(items), "--output", str(output), "--mesh.tensor", "1"),
        ]
    )
    messages = capsys.readouterr().err
    assert status != 0
    assert ERROR in messages
    assert ("question 2, turn 1" if command == "mt-bench" else f"{items}:2") in messages
    # What was right before it is kept; nothing claims to be the result.
    assert len(output.read_text().splitlines()) == written
    assert not output.with_suffix(".json").exists()


def test_the_harness_model_fails_and_names_the_request(base_alone, failing):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.api.instance import Instance

    from ivl_jax.evaluation.harness import IvlLM

    requests = [
        Instance("generate_until", {}, ("Once", {"until": [], "max_gen_toks": 4}), index)
        for index in range(2)
    ]
    with pytest.raises(GenerationError, match=f"request [01]: {ERROR}"):
        IvlLM(base_alone).generate_until(requests, disable_tqdm=True)


def test_the_demo_fails_and_names_the_question(base_alone, failing):
    from ivl_jax.experiments.demonstrations import Item
    from ivl_jax.experiments.measure import answers

    items = [Item(f"Where is {i}?", "Here.", "fact", "someone", "test") for i in range(2)]
    with pytest.raises(GenerationError, match=rf"Where is 1\?: {ERROR}"):
        answers(base_alone, items)
