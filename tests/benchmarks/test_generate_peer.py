"""The peer in sampling: padding on the left changes nothing, and rows have their own lengths."""

import pytest

torch = pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.generate_peer import PAD, AddedLogits, sample_answers  # noqa: E402

SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.fixture
def value() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE).eval()


@torch.inference_mode()
def test_a_padded_rows_added_logits_are_those_of_the_row_alone(value: LlamaForCausalLM) -> None:
    ids = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10]])
    added = AddedLogits(value, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    nothing = torch.zeros(2, SHAPE.vocab_size)
    for following in ([], [[3], [4]], [[11], [12]]):
        ids = torch.cat([ids, torch.tensor(following, dtype=torch.long).reshape(2, -1)], dim=1)
        found = added(ids, nothing)
        alone = torch.cat([value(row).logits[:, -1] for row in (ids[:1, 2:], ids[1:])])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_rows_end_after_their_own_number_of_tokens(value: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    base = LlamaForCausalLM(SHAPE).eval()
    tokens = sample_answers(base, value, [[5, 6], [7, 8, 9]], [2, 6])
    assert tokens.shape == (2, 9)
    assert (tokens[0, 5:] == PAD).all()
