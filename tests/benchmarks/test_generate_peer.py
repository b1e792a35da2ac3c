"""The peer in writing answers: padding on the left changes nothing; a batch ends with its last."""

import pytest

torch = pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.generate_peer import PAD, AddedLogits, write_answers  # noqa: E402

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


def test_a_batch_ends_with_its_longest_answer(value: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    base = LlamaForCausalLM(SHAPE).eval()
    for lengths in ([2, 6], [6, 2]):
        tokens = write_answers(base, value, [[5, 6], [7, 8, 9]], lengths, greedy=False)
        assert tokens.shape == (2, 9)
        assert tokens[:, :3].tolist() == [[PAD, 5, 6], [7, 8, 9]]


def test_a_greedy_answer_takes_the_likeliest_tokens_of_the_sum(value: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    base = LlamaForCausalLM(SHAPE).eval()
    found = write_answers(base, value, [[5, 6, 7]], [4], greedy=True)
    for end in range(3, 7):
        with torch.inference_mode():
            total = base(found[:, :end]).logits + value(found[:, :end]).logits
        assert found[0, end] == total[0, -1].argmax()
