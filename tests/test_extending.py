"""The seams, used from outside: this module alone defines and runs each kind of extension."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main as run_benchmarks
from benchmarks.report import Options, Report, Row
from benchmarks.timing import Figures
from ivl_jax.checkpoint import load_value
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.composed.sources import load_schemes, read_value
from ivl_jax.composition import ConnectionScheme
from ivl_jax.config import ComposedModelConfig, InferConfig, MeshConfig, RowsConfig, StepConfig
from ivl_jax.data.demonstrations import DemonstrationSource, store_demonstrations
from ivl_jax.data.formats import Message, RowError, RowFormat
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.device.proposals import Proposals, Proposer, longest_round
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.evaluation.flags import ModelFlags
from ivl_jax.evaluation.loading import find_sources
from ivl_jax.extensions import load_extension
from ivl_jax.model.decoder import abstract_params, embed
from ivl_jax.model.hf_families import FAMILIES
from ivl_jax.training.loop import run
from ivl_jax.training.objectives import OBJECTIVES, SFT, Objective
from ivl_jax.weights.language_model import load_language_model
from tests.training.conftest import make_tiny_config, save_tiny_model, tiny_pair  # noqa: F401
from tests.training.runs import records

HERE = "tests.test_extending"
STEPS = StepConfig(max_steps=6, batch_size=4)


def _confident_text(graphdef, params, inputs):
    """Embeddings of the text, louder where the base is sure of what follows."""
    logits = inputs.base_logits[..., : inputs.vocab_size]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    confidence = 1 / jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)
    return embed(graphdef, params, inputs.tokens) * (1 + confidence)


CONFIDENT = ConnectionScheme("confident", _confident_text, reads_base_logits=True)


def _weigh(batch, first):
    """Tokens that the model finds easy count less."""
    surprise = 1 - jnp.exp(first["log_prob"])
    return {"log_prob": -jnp.where(batch.loss_mask, surprise, 0.0)}


FOCAL = Objective(
    name="focal",
    scores=("log_prob",),
    weigh=_weigh,
    count=SFT.count,
    sums=SFT.sums,
    figures=SFT.figures,
    first_pass=("log_prob",),
    monitored=("top1",),
    evaluated=SFT.evaluated,
)


def _read_quiz(row, templates):
    """`{"quiz": [["2 + 3?", "5"], …]}`: one question and its answer after the other."""
    if not isinstance(row.get("quiz"), list):
        raise RowError("expected quiz, a list of questions and answers")
    roles = ("user", "assistant")
    return [Message(*turn) for pair in row["quiz"] for turn in zip(roles, pair, strict=True)]


QUIZ = RowFormat("quiz", _read_quiz)


def two_sums(options: Options) -> Report:
    """Two sums of known cost."""
    rows = [
        Row(f"{n} + {n}", Figures(n / 4, 0.0), "s") for n in (1, 2)[: 1 if options.quick else 2]
    ]
    return Report(rows, dtype="float32", shapes={"n": 2})


# A Llama with a second norm around each sub-layer, whose files cap the logits at 4.
CAPPED = replace(
    FAMILIES["llama"], optional={"final_logit_softcapping": 4.0}, fixed={"post_norms": True}
)


@pytest.fixture
def tiny_config(tiny_pair, tmp_path):  # noqa: F811
    return replace(make_tiny_config(tiny_pair, tmp_path / "run"), step=STEPS)


def test_a_connection_scheme_of_ones_own_trains_saves_and_decodes(tiny_config, tiny_pair):  # noqa: F811
    name = f"{HERE}:CONFIDENT"
    result = run(replace(tiny_config, value=replace(tiny_config.value, connection=name)))
    assert result.held_out["nll"] < records(result.run_dir)[0]["held_out"]["nll"] - 0.1
    value, base = load_value(result.output), load_language_model(tiny_pair / "base")
    assert value.connection == name
    model = compose(base, value, schemes={name: CONFIDENT})
    options = GenerationOptions(max_new_tokens=5)
    (text,) = model.generate(["1 + 1?"], options)
    assert len(text.token_ids) > 0
    alone = compose(base).generate(["1 + 1?"], options)[0]
    assert text.token_ids != alone.token_ids


def test_a_value_folder_never_causes_an_import(tiny_config, tmp_path):
    name = f"{HERE}:CONFIDENT"
    result = run(replace(tiny_config, value=replace(tiny_config.value, connection=name)))
    with pytest.raises(ValueError, match=f"never causes an import.* --connection {name}"):
        read_value(str(result.output))
    assert read_value(str(result.output), schemes={name: CONFIDENT}).scheme is CONFIDENT
    # The flag that the error names, of infer.py and of evaluations.
    flags = ComposedModelConfig(
        base=str(tiny_config.base.path), value=(str(result.output),), mesh=MeshConfig(1, 1, 1)
    )
    with pytest.raises(ValueError, match=f"--connection {name}"):
        find_sources(ModelFlags(flags))
    (value,) = find_sources(ModelFlags(replace(flags, connection=(name,)))).models.values
    assert value.scheme is CONFIDENT
    given = ["--base", "B", "--value", "V", "--connection", name]
    assert parse_flags(InferConfig, given, prog="infer.py").model.connection == (name,)
    with pytest.raises(ValueError, match=r"--connection = .nowhere:X.: No module named"):
        load_schemes(["nowhere:X"])


def test_an_objective_of_ones_own_trains_with_weights_from_a_first_pass(tiny_config):
    result = run(replace(tiny_config, objective=f"{HERE}:FOCAL"))
    figures = [record for record in records(result.run_dir) if "loss" in record]
    assert figures
    assert all(record["loss"] - record["penalty"] < record["nll"] for record in figures)
    assert result.held_out["nll"] < records(result.run_dir)[0]["held_out"]["nll"] - 0.05
    assert np.isfinite(result.held_out["base_nll"])


def _repeat(composition, params, state, count):
    """Propose what followed the last token where the text had it before."""
    places = jnp.arange(state.tokens.shape[1])[None, :]
    seen = (state.tokens == state.last_tokens[:, None]) & (places < state.last_positions[:, None])
    found = jnp.max(jnp.where(seen, places, 0), axis=1)
    following = found[:, None] + 1 + jnp.arange(longest_round(composition))[None, :]
    return (
        Proposals(
            tokens=jnp.take_along_axis(state.tokens, following, axis=1, mode="clip"),
            counts=jnp.full_like(state.lengths, count),
            failed=jnp.zeros_like(state.running),
        ),
        state,
    )


REPEATING = Proposer(
    name="repetition",
    empty=lambda composition, rows, capacity: (),
    read_prompts=lambda composition, params, own, tokens, positions, lengths: own,
    available=lambda state: jnp.full_like(state.lengths, state.tokens.shape[1]),
    propose=_repeat,
    settle=lambda state, count, gained: state.speculation.proposer,
    seconds=lambda composition, params, pass_seconds, rows: 0.0,
    shardings=lambda composition: (),
)


def test_a_proposer_of_ones_own_changes_no_token_and_has_some_accepted(tiny_pair):  # noqa: F811
    base = load_language_model(tiny_pair / "base")
    plain = compose(base, base, strengths=0.5)
    composition = replace(plain.composition, draft_length=3)
    model = replace(plain, composition=composition, programs=build_programs(composition, REPEATING))
    prompts, options = ["1 + 1? 1 + 1? 1 + 1", "abc abc ab", ""], {"max_new_tokens": 24}
    found = model.generate(prompts, options, batch_size=2)
    assert found == plain.generate(prompts, options)
    assert sum(generation.accepted_tokens for generation in found) > 0
    assert all(each.accepted_tokens <= each.proposed_tokens for each in found)


def test_a_name_that_is_nothing_says_what_is_expected():
    with pytest.raises(ValueError, match=r"expected one of sft, .* or module:attribute"):
        load_extension("dpoo", OBJECTIVES, Objective, where="objective")
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        load_extension("nowhere:X", OBJECTIVES, Objective, where="objective")
    with pytest.raises(ValueError, match="expected a Objective, found ConnectionScheme"):
        load_extension(f"{HERE}:CONFIDENT", OBJECTIVES, Objective, where="objective")


def test_a_row_format_of_ones_own_is_read_as_the_built_in_ones_are(tmp_path):
    questions = [(f"{i} + 1?", str(i + 1)) for i in range(9)]
    quiz, messages = tmp_path / "quiz.jsonl", tmp_path / "messages.jsonl"
    roles = ("user", "assistant")
    turns = [
        [dict(zip(("role", "content"), x, strict=True)) for x in zip(roles, q, strict=True)]
        for q in questions
    ]
    quiz.write_text("".join(json.dumps({"quiz": [q]}) + "\n" for q in questions))
    messages.write_text("".join(json.dumps({"messages": x}) + "\n" for x in turns))
    said = []
    for path, name in ((quiz, f"{HERE}:QUIZ"), (messages, "messages")):
        source = DemonstrationSource((str(path),), row_format=name, validation_fraction=0.0)
        stored = store_demonstrations(source, data_dir=tmp_path / "cache")
        said.append([row.messages for row in stored.open("train")])
    assert said[0] == said[1]
    assert len(said[0]) == 9
    quiz.write_text('{"quiz": [["2 + 3?"]]}\n{"quiz": 1}\n')
    with pytest.raises(ValueError, match=r"(?s)jsonl:1: format quiz: .*jsonl:2: expected quiz"):
        store_demonstrations(
            DemonstrationSource((str(quiz),), row_format=f"{HERE}:QUIZ"), data_dir=tmp_path
        )


def test_a_benchmark_of_ones_own_runs_by_its_name(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert run_benchmarks([f"{HERE}:two_sums", "--quick", "--json", str(report)]) == 0
    assert "Two sums of known cost." in capsys.readouterr().out
    assert [row["name"] for row in json.loads(report.read_text())["rows"]] == ["1 + 1"]


def test_a_family_of_ones_own_is_a_table_entry(tiny_pair, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(FAMILIES, "capped", CAPPED)
    base = save_tiny_model(tmp_path / "base", seed=2, model_type="capped", num_hidden_layers=1)
    model = load_language_model(base)
    assert model.arch.post_norms
    assert model.arch.final_logit_softcapping == 4.0
    assert "post_feedforward_layernorm" in abstract_params(model.arch)["layers"][0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"quiz": [["{i} + 1?", "{i + 1}"]]}}\n' for i in range(40)))
    config = make_tiny_config(tiny_pair, tmp_path / "run")
    result = run(
        replace(
            config,
            step=STEPS,
            base=replace(config.base, path=str(base)),
            value=replace(config.value, path=str(base)),
            data=replace(config.data, train=(str(rows),), rows=RowsConfig(format=f"{HERE}:QUIZ")),
        )
    )
    assert result.held_out["nll"] < records(result.run_dir)[0]["held_out"]["nll"] - 0.1
    assert load_value(result.output).arch == model.arch
