"""SmolLM2-135M-Instruct, a real chat model, computed here and by transformers.

`SMOLLM2_FOLDER` names its folder; `../shared/tools/smollm2.py FOLDER` makes one.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.model.decoder import build_decoder, forward
from ivl_jax.weights.language_model import load_language_model

QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
)
LENGTH = 160


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder with the weights."""
    given = os.environ.get("SMOLLM2_FOLDER", "")
    if not (given and (Path(given) / "model.safetensors").is_file()):
        pytest.skip("SMOLLM2_FOLDER does not name a folder of SmolLM2-135M-Instruct")
    return Path(given)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The model of transformers."""
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.mark.slow
def test_logits_of_a_long_text_are_those_of_transformers(
    folder: Path, theirs: Any, gsm8k_dir: Path
) -> None:
    import torch

    ours = load_language_model(folder)
    with (gsm8k_dir / "test.jsonl").open(encoding="utf-8") as file:
        text = "\n".join(
            json.loads(line)["question"] for line, _ in zip(file, range(4), strict=False)
        )
    ids = ours.tokenizer(text)["input_ids"][:LENGTH]
    assert len(ids) == LENGTH
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    tokens = jnp.asarray([ids], jnp.int32)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    found = forward(build_decoder(ours.arch), ours.params, tokens, positions=positions)[0]
    # Logits reach 40; float32 sums of 576 and 1,536 products over 30 layers.
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    import torch

    model = compose(load_language_model(folder))
    asked = [(Message("user", question),) for question in QUESTIONS]
    generations = model.generate(asked, max_new_tokens=32)
    for question, generation in zip(QUESTIONS, generations, strict=True):
        prompt = model.encode((Message("user", question),))
        rendered = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        assert prompt == rendered
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)
        expected = model.tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
        assert generation.text == expected
    assert "Paris" in generations[0].text
