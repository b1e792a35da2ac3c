"""A value network in PyTorch: z = z_base + α · z_value inside `model.generate`.

    python -m ivl_jax.checkpoint export-hf runs/mine/value value_hf
    python examples/logits_processor.py BASE value_hf "Explain tides." --strength 1.0

Needs PyTorch and transformers, and nothing of ivl_jax. Greedy text is that of infer.py.
"""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor


class ValueLogits(LogitsProcessor):
    """Adds α · z_value to the base's logits; make a new one for each call of `generate`.

    It keeps a cache of its own and reads each token once. Prompts of a batch must have one length
    (padding would be read as text), and beam search would have to reorder the cache: use neither.
    """

    def __init__(self, value, strength=1.0):
        self.value, self.strength = value, strength
        self.cache, self.read = DynamicCache(config=value.config), 0
        # transformers 5.24 renamed `past_key_values` to `cache`; both spellings are about.
        spelled = inspect.signature(value.forward).parameters
        self.cache_argument = "cache" if "cache" in spelled else "past_key_values"

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        unread, self.read = input_ids[:, self.read :], input_ids.shape[1]
        output = self.value(unread, **{self.cache_argument: self.cache})
        value_logits = output.logits[:, -1].float()
        width = min(scores.shape[-1], value_logits.shape[-1])  # rows beyond the tokenizer differ
        scores[:, :width] += self.strength * value_logits[:, :width]
        return scores


def main():
    parser = argparse.ArgumentParser(description="Decode a base with a value network, in PyTorch.")
    parser.add_argument("base", help="Hugging Face folder or hub id of the base")
    parser.add_argument("value", help="folder written by export-hf")
    parser.add_argument("prompt")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--chat", action="store_true", help="use the value's chat template")
    chosen = parser.parse_args()
    base, value = map(AutoModelForCausalLM.from_pretrained, (chosen.base, chosen.value))
    tokenizer, of_base = map(AutoTokenizer.from_pretrained, (chosen.value, chosen.base))
    if tokenizer.get_vocab() != of_base.get_vocab():
        parser.error("base and value have different vocabularies: decode them with infer.py --map")
    if chosen.chat:
        dialogue = [{"role": "user", "content": chosen.prompt}]
        inputs = tokenizer.apply_chat_template(
            dialogue, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(chosen.prompt, return_tensors="pt")
    output = base.generate(
        input_ids=inputs["input_ids"],
        do_sample=False,
        max_new_tokens=chosen.max_new_tokens,
        eos_token_id=value.generation_config.eos_token_id,
        logits_processor=[ValueLogits(value, chosen.strength)],
    )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(new_tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
