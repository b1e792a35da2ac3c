"""Several value networks in PyTorch's `generate`, with caches, strengths, padding and maps."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
)

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.tokenizer import describe_tokenizer
from ivl_jax.tokenizer_agreement import TokenizerMismatchError
from ivl_jax.vocabulary.mapping import (
    VocabularyMap,
    VocabularyMapError,
    apply_vocabulary_map,
    save_vocabulary_map,
)
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.anew import random_map

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

from ivl_jax.integrations.transformers import (  # noqa: E402
    TextMap,
    ValueLogits,
    load_torch_value,
)

ROWS, TOKENS = 48, 12
EXCHANGED = Path(__file__).parents[1] / "fixtures" / "exchanged"


def tokenizer(*appended: str, first: str = "t0") -> PreTrainedTokenizerFast:
    """Words of a vocabulary of ROWS tokens, and appended ones."""
    words = [first, *(f"t{i}" for i in range(1, ROWS)), *appended]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="t1")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="t1")


def logits_of(values: Any, *more: Any, **options: Any) -> ValueLogits:
    """A processor of value networks that share the base's tokens."""
    shared = {"base_tokenizer": tokenizer(), "value_tokenizers": [tokenizer()] * len(values)}
    return ValueLogits(values, *more, **{**shared, **options})


def test_another_vocabulary_is_an_error_that_names_both(networks) -> None:
    with pytest.raises(TokenizerMismatchError, match=r"id 0: .*t0.* in the base.*vocabulary map"):
        logits_of(networks[1:2], value_tokenizers=[tokenizer(first="other")])
    with pytest.raises(ValueError, match="base_tokenizer and value_tokenizers: expected"):
        ValueLogits(networks[1:2])


def test_appended_tokens_and_padding_get_no_value_logit(networks) -> None:
    processor = logits_of(networks[2:], base_tokenizer=tokenizer("t48", "t49"))
    scores = torch.randn(1, ROWS + 8)
    composed = processor(torch.tensor([[5, 48, 7]]), scores)
    with torch.no_grad():
        value = networks[2](torch.tensor([[5, 1, 7]])).logits[:, -1]
    torch.testing.assert_close(composed[:, :ROWS], (scores + value)[:, :ROWS])
    assert torch.equal(composed[:, ROWS:], scores[:, ROWS:])


def network(seed: int, *, rows: int = ROWS) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=1.0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def networks() -> list[Any]:
    """A base and two value networks, of which one has more vocabulary rows."""
    return [network(0), network(1), network(2, rows=ROWS + 8)]


PROMPT = torch.tensor([[5, 7, 11], [3, 2, 1]])


def generate(
    base: Any,
    processor: LogitsProcessor,
    prompt: torch.Tensor = PROMPT,
    **options: Any,
) -> list[list[int]]:
    output = base.generate(
        input_ids=prompt,
        max_new_tokens=TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[processor],
        **{"do_sample": False, "attention_mask": torch.ones_like(prompt), **options},
    )
    return output[:, prompt.shape[1] :].tolist()


@torch.no_grad()
def without_caches(networks: list[Any], strengths: list[float]) -> list[list[int]]:
    text = PROMPT
    for _ in range(TOKENS):
        terms = [one(text).logits[:, -1, :ROWS] for one in networks]
        each = zip([1.0, *strengths], terms, strict=True)
        composed = torch.stack([alpha * term for alpha, term in each]).sum(dim=0)
        text = torch.cat([text, composed.argmax(-1, keepdim=True)], dim=1)
    return text[:, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("strengths", [[0.7, -0.4], [0.0, 1.0]])
def test_several_values_with_caches_write_what_they_write_without(networks, strengths) -> None:
    base, *values = networks
    text = generate(base, logits_of(values, strengths))
    assert text == without_caches(networks, strengths)
    assert text != without_caches(networks, [0.0, 0.0])


def test_a_processor_may_be_used_again(networks) -> None:
    base, *values = networks
    processor = logits_of(values)
    other = PROMPT.flip(1)
    assert generate(base, processor) == generate(base, logits_of(values))
    assert generate(base, processor, other) == generate(base, logits_of(values), other)


def test_a_value_of_strength_0_is_not_computed(networks) -> None:
    class Unused:
        config = networks[1].config

        def forward(self, input_ids, cache=None):
            pytest.fail("computed")

        __call__ = forward

    generate(networks[0], logits_of([Unused()], [0.0]))


def test_one_strength_and_one_map_per_value(networks) -> None:
    with pytest.raises(ValueError, match="strengths: expected one per value network, 2, got 1"):
        logits_of(networks[1:], [1.0])
    with pytest.raises(ValueError, match="text_maps: expected one per value network, 2, got 1"):
        logits_of(networks[1:], text_maps=[None])
    with pytest.raises(ValueError, match="strengths must be finite, got nan"):
        logits_of(networks[1:], [1.0, float("nan")])


def test_log_probabilities_are_refused_as_of_beam_search(networks) -> None:
    base, value, _ = networks
    with pytest.raises(ValueError, match=r"got log-probabilities.*set num_beams=1"):
        generate(base, logits_of([value]), num_beams=2)


def test_padding_on_the_right_and_the_mask_of_another_batch_are_refused(networks) -> None:
    with pytest.raises(ValueError, match="padding on the left only"):
        logits_of(networks[1:], attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    other = logits_of(networks[1:], attention_mask=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(2, 4\), but the text is \[2 3\]"):
        generate(networks[0], other)


def test_samples_of_a_prompt_are_those_of_the_sum_of_all_logits(networks) -> None:
    base, *values = networks
    mask = torch.ones_like(PROMPT)

    class Composed(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + sum(one(input_ids).logits[:, -1, :ROWS] for one in values)

    sampling = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}
    texts = []
    for processor in (logits_of(values, attention_mask=mask), Composed()):
        torch.manual_seed(0)
        texts.append(generate(base, processor, **sampling))
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_rejected_tokens_of_a_draft_leave_the_caches(networks) -> None:
    base, *values = networks
    draft = network(5)
    plain = generate(base, logits_of(values), PROMPT[:1])
    assert generate(base, logits_of(values), PROMPT[:1], assistant_model=draft) == plain


def test_a_padded_batch_writes_what_each_prompt_writes_alone(networks) -> None:
    base, *values = networks
    prompt, mask = torch.tensor([[9, 9, 7, 3], [4, 1, 2, 6]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    together = generate(base, logits_of(values, attention_mask=mask), prompt, attention_mask=mask)
    alone = [generate(base, logits_of(values), prompt[:1, 2:])]
    alone.append(generate(base, logits_of(values), prompt[1:]))
    assert together == [text for (text,) in alone]


FAMILY = {name: family_folder(name) for name in ("S", "X")}
TEXTS = ["def add(a, b):\n", "What does `os.path.join(a, *p)` do?\nnaïve 水", "x"]


def test_a_padded_batch_with_a_map_writes_the_greedy_text_of_infer(tmp_path: Path) -> None:
    base, value = (load_language_model(folder) for folder in FAMILY.values())
    by_map = random_map(base, value)
    save_vocabulary_map(tmp_path / "map", by_map.vocabulary_map, by_map.metadata)
    model = compose(base, value, strengths=1.0, maps=by_map)
    ours = model.generate(TEXTS, GenerationOptions(max_new_tokens=TOKENS))

    of_base, of_value = (AutoTokenizer.from_pretrained(folder) for folder in FAMILY.values())
    of_base.pad_token, of_base.padding_side = of_base.eos_token, "left"
    inputs = of_base(TEXTS, padding=True, return_tensors="pt")
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(f) for f in FAMILY.values()]
    torch_base, torch_value = models
    text_map = TextMap(tmp_path / "map", of_base, of_value)
    processor = ValueLogits([torch_value], [1.0], text_maps=[text_map], attention_mask=mask)
    theirs = generate(torch_base, processor, prompt, attention_mask=mask)
    for our, their in zip(ours, theirs, strict=True):
        assert list(our.token_ids) == their[: len(our.token_ids)]
    assert theirs == generate(torch_base, processor, prompt, attention_mask=mask), "used again"
    alone = torch_base.generate(
        prompt, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
    )
    assert theirs != alone[:, prompt.shape[1] :].tolist(), "the value network changes the text"


def test_logits_are_mapped_and_ends_are_named_as_we_do(tmp_path: Path) -> None:
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in FAMILY.values()]
    models = [_Described(one) for one in tokenizers]
    z = np.random.default_rng(0).normal(size=(2, len(tokenizers[1]))).astype(np.float32)
    for number, options in enumerate(({}, {"centred": True}, {"entries": 3})):
        described = random_map(*models, **options)
        if "entries" in options:
            index, weight = described.vocabulary_map
            total = weight.sum(axis=1, keepdims=True)
            scaled = VocabularyMap(index, weight / jnp.where(total == 0, 1.0, total))
            described = described._replace(vocabulary_map=scaled)
        path = tmp_path / f"map{number}"
        save_vocabulary_map(path, described.vocabulary_map, described.metadata)
        text_map = TextMap(path, *tokenizers)
        expected = apply_vocabulary_map(
            jnp.asarray(z)[:, None],
            described.vocabulary_map,
            centred=described.metadata.centred,
        )
        mapped = text_map.to_base(torch.from_numpy(z))
        np.testing.assert_allclose(mapped, expected[:, 0], atol=1e-5)
    ends = models[1].tokenizer_info.eos_ids
    assert set(text_map.stop_ids(ends)) == set(models[0].tokenizer_info.eos_ids)


def test_a_map_of_other_tokenizers_is_refused(tmp_path: Path) -> None:
    base, value = (AutoTokenizer.from_pretrained(folder) for folder in FAMILY.values())
    described = random_map(_Described(base), _Described(value))
    save_vocabulary_map(tmp_path / "map", described.vocabulary_map, described.metadata)
    with pytest.raises(VocabularyMapError, match="base and value are swapped"):
        TextMap(tmp_path / "map", value, base)


class _Described:
    """As much of a model as a random map is made of."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer_info = describe_tokenizer(tokenizer)


def test_a_network_that_reads_the_base_is_refused() -> None:
    with pytest.raises(ValueError, match="connection cascade, expected residual"):
        load_torch_value(str(EXCHANGED / "cascade"))


def test_without_torch_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try:\n    import ivl_jax.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the extra `torch`" in done.stdout
