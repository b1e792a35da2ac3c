"""The harness model, run by the real lm_eval on local tasks, against its own Hugging Face model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ivl_jax.evaluation.scoring import Row, score_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval, datasets and their dependencies

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs:
  until: ["\\n", "Tom", "</s>"]
  max_gen_toks: 20
metric_list:
  - metric: bypass
""",
}


def tasks_and_data(gsm8k_dir, stories260k_dir):
    """Rows of each task: numbers of GSM8K among others, stories, beginnings of stories."""
    with (gsm8k_dir / "test.jsonl").open() as lines:
        items = [json.loads(next(lines)) for _ in range(4)]
    story = (stories260k_dir / "expected_greedy.txt").read_text()
    return {
        # Choices of one token and of several, which share a context.
        "local_choice": [
            {
                "question": item["question"][:90],
                "choices": ["0", "7", item["answer"].split("#### ")[1], "Once upon a time"],
                "gold": 2,
            }
            for item in items
        ],
        # The second one is longer than the context: two windows.
        "local_rolling": [{"text": story[:200]}, {"text": story * 2}],
        "local_generate": [{"text": text} for text in ("Once upon a time", "Lily", "The dog said")],
    }


@pytest.fixture(scope="module")
def task_manager(lm_eval, gsm8k_dir, stories260k_dir, tmp_path_factory):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in tasks_and_data(gsm8k_dir, stories260k_dir).items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        (folder / f"{name}.yaml").write_text(head + files + TASKS[name])
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def evaluate(lm_eval, task_manager, tmp_path_factory):
    """Runs the harness on all tasks: (metrics by task, responses by task)."""

    def run(model, **arguments):
        with pytest.MonkeyPatch.context() as patch:
            cache = str(tmp_path_factory.mktemp("datasets"))
            patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=list(TASKS),
                task_manager=task_manager,
                bootstrap_iters=0,
                **arguments,
            )
        responses = {
            task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
            for task, samples in results["samples"].items()
        }
        return results["results"], responses

    return run


@pytest.fixture(scope="module")
def of_the_base(evaluate, stories260k_dir):
    return evaluate("ivl", model_args={"base": str(stories260k_dir), "tensor": 1, "batch_size": 4})


@pytest.fixture(scope="module")
def of_hugging_face(evaluate, stories260k_dir):
    pytest.importorskip("accelerate", reason="the harness' Hugging Face model needs accelerate")
    arguments = {"pretrained": str(stories260k_dir), "dtype": "float32"}
    return evaluate("hf", model_args=arguments, device="cpu", batch_size=2)


@pytest.fixture(autouse=True, scope="module")
def _registered(lm_eval):
    import ivl_jax.evaluation.harness  # noqa: F401


def log_likelihoods(responses):
    return np.asarray([float(answer[0]) for sample in responses for [answer] in sample])


def test_log_likelihoods_are_those_of_the_harness_own_hugging_face_model(
    of_the_base, of_hugging_face
):
    ours, theirs = of_the_base[1]["local_choice"], of_hugging_face[1]["local_choice"]
    assert len(log_likelihoods(ours)) == 16
    np.testing.assert_allclose(log_likelihoods(ours), log_likelihoods(theirs), atol=1e-3)
    greedy = [[answer[1] for [answer] in sample] for sample in ours]
    assert greedy == [[answer[1] for [answer] in sample] for sample in theirs]


def test_rolling_log_likelihoods_are_those_of_the_hugging_face_model(of_the_base, of_hugging_face):
    ours, theirs = (
        [float(answer) for [[answer]] in responses["local_rolling"]]
        for _, responses in (of_the_base, of_hugging_face)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert ours[1] < -100


def test_generated_texts_are_those_of_the_hugging_face_model(of_the_base, of_hugging_face):
    assert of_the_base[1]["local_generate"] == of_hugging_face[1]["local_generate"]
    texts = [text for [[text]] in of_the_base[1]["local_generate"]]
    assert all(texts)
    assert not any("Tom" in text for text in texts)


def test_the_metrics_are_those_of_the_hugging_face_model(of_the_base, of_hugging_face):
    for task, ours in of_the_base[0].items():
        theirs = of_hugging_face[0][task]
        numbers = {name: value for name, value in ours.items() if isinstance(value, float)}
        for name, value in numbers.items():
            assert value == pytest.approx(theirs[name], rel=1e-4), (task, name)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, doc={}, arguments=one, idx=0, metadata=("t", 0, 1)) for one in arguments]


@pytest.fixture
def model(lm_eval, composed):
    """The composed model behind the harness' interface."""
    from ivl_jax.evaluation.harness import IvlLM

    return IvlLM(composed, batch_size=4)


def test_a_value_networks_answers_are_those_of_the_composition(model, composed, base_alone):
    (answer,) = model.loglikelihood(requests("loglikelihood", ("Once upon", " a time")))
    prefix, whole = composed.encode("Once upon"), composed.encode("Once upon a time")
    for network, same in ((composed, True), (base_alone, False)):
        ((_, scores),) = score_rows(network, [Row(whole)], batch_size=4)
        expected = scores.tokens.log_prob[len(prefix) - 1 :].sum()
        assert bool(abs(answer[0] - expected) < 1e-3) is same
    assert model.loglikelihood(requests("loglikelihood", ("", "Once")))[0][0] < 0


def test_choices_of_one_token_share_a_row(model, monkeypatch):
    read = []

    def recording(model, rows, **options):
        read.extend(rows)
        return score_rows(model, rows, **options)

    choices = requests("loglikelihood", *[("The", f" {letter}") for letter in "SLTSM"])
    apart = [model.loglikelihood([choice])[0] for choice in choices]
    monkeypatch.setattr("ivl_jax.evaluation.harness.score_rows", recording)
    assert model.loglikelihood(choices) == [
        (pytest.approx(value, abs=1e-4), greedy) for value, greedy in apart
    ]
    assert len(read) == 1
    assert len(read[0].other_last) == 3


def test_requests_beyond_the_context_lose_their_beginning_with_a_warning(model, caplog):
    long, end = "Lily " * 600, ("Once upon a time there was", " a dog")
    (answer,) = model.loglikelihood(requests("loglikelihood", (long + end[0], end[1])))
    assert "1 requests are longer than 512 tokens: their beginning was cut off" in caplog.text
    before, whole = model.tok_encode(long + end[0]), model.tok_encode(long + "".join(end))
    ((_, scores),) = score_rows(model.model, [Row(whole[-513:])], batch_size=4)
    expected = scores.tokens.log_prob[len(before) - len(whole) :].sum()
    assert answer[0] == pytest.approx(float(expected), abs=1e-3)
    with pytest.raises(ValueError, match="expected 1 to 512, the most that a request may have"):
        model.loglikelihood(requests("loglikelihood", ("Once", long)))


def test_repeated_requests_are_sampled_apart_and_again_the_same(model, read_prompts):
    asked = ("Once", {"do_sample": True, "temperature": 0.1, "top_p": 0.95, "max_gen_toks": 9})
    model.generate_until(requests("generate_until", asked, asked, ("A longer one", {}), asked))
    prompts = [prompt for batch in read_prompts for prompt in batch]
    # Longest first, samples by index.
    assert [prompt.sample_index for prompt in prompts] == [2, 0, 1, 3]
    assert [prompt.options.temperature for prompt in prompts] == [0.0, 0.1, 0.1, 0.1]
    assert [prompt.options.max_new_tokens for prompt in prompts] == [256, 9, 9, 9]
    assert prompts[1].options.top_p == 0.95


def test_a_special_token_among_the_stop_strings_stops_as_a_token(model, read_prompts):
    until = ["</s>", "\n\n", ""]
    model.generate_until(requests("generate_until", ("Once", {"until": until})))
    ((prompt,),) = read_prompts
    assert prompt.options.stop == ("\n\n",)
    assert prompt.options.stop_ids == (2,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_beams": 4}, "generation argument num_beams = 4 is not supported by ivl"),
        ({"max_gen_toks": 512}, "max_gen_toks = 512 leaves no room for a prompt in 512 tokens"),
    ],
)
def test_generation_arguments_that_cannot_be_kept_are_refused(model, read_prompts, arguments, said):
    with pytest.raises(ValueError, match=said):
        model.generate_until(requests("generate_until", ("Once", arguments)))
    assert read_prompts == []
    model.generate_until(requests("generate_until", ("Once", {"num_beams": 1, "use_cache": True})))


def test_dialogues_are_written_in_the_values_template_and_end_with_the_turn(model, read_prompts):
    dialogue = [{"role": "user", "content": "Who?"}]
    text = model.apply_chat_template(dialogue)
    assert text == "<s>Question: Who?\nAnswer:"
    begun = model.apply_chat_template(
        [*dialogue, {"role": "assistant", "content": "It is"}], add_generation_prompt=False
    )
    assert begun == "<s>Question: Who?\nAnswer: It is"
    model.generate_until(requests("generate_until", (text, {})))
    ((prompt,),) = read_prompts
    assert prompt.token_ids.count(1) == 1, "the beginning of the sequence stands once"
    assert 2 in prompt.options.stop_ids
    assert model.chat_template(True) == "plain"


@pytest.mark.parametrize(
    ("group", "row"),
    [
        (
            "humaneval_n20",
            {"prompt": "def f():\n", "test": "def check(f):\n    f()", "entry_point": "f"},
        ),
        ("mbpp_n20", {"text": "Add.", "code": "", "test_list": ["assert 1"] * 3}),
    ],
)
def test_code_tasks_draw_twenty_samples_for_pass_at_k(
    lm_eval, model, read_prompts, monkeypatch, group, row
):
    """The harness' own tasks and metric, but for what they would download."""
    import datasets
    import evaluate
    from lm_eval.tasks import TaskManager

    from ivl_jax.evaluation.harness_command import TASKS_FOLDER

    judged = []

    class CodeEval:
        def compute(self, references, predictions, k):
            judged.append(predictions)
            return {f"pass@{n}": n / 40 for n in k}, None

    def load_dataset(**_):
        return datasets.DatasetDict(test=datasets.Dataset.from_list([row, row]))

    monkeypatch.setattr(evaluate, "load", lambda *_, **__: CodeEval())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("humaneval", "mbpp"):
        monkeypatch.delitem(sys.modules, f"lm_eval.tasks.{name}.utils", raising=False)
    own = Path(lm_eval.__file__).parent / "tasks" / group.removesuffix("_n20")
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[group],
        task_manager=TaskManager(include_path=[TASKS_FOLDER, own], include_defaults=False),
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 16},  # the model's context is 512
        confirm_run_unsafe_code=True,
    )
    prompts = [prompt for batch in read_prompts for prompt in batch]
    assert len(prompts) == 40
    assert {prompt.sample_index for prompt in prompts} == set(range(40))
    assert {(p.options.temperature, p.options.top_p) for p in prompts} == {(0.1, 0.95)}
    samples = judged[-1][0]
    assert len(samples) == 20
    (figures,) = (found for task, found in results["results"].items() if task != group)
    found = {name.split(",")[0]: value for name, value in figures.items() if "pass@" in name}
    assert {name: found[name] for name in ("pass@1", "pass@20")} == {
        "pass@1": 0.025,
        "pass@20": 0.5,
    }
