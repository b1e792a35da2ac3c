"""A value network in PyTorch: z = z_base + α · z_value inside `model.generate`.

    python examples/logits_processor.py BASE runs/mine/value "Explain tides." --strength 1.0

Needs the extra `torch`. Greedy text is that of infer.py.
"""

import argparse
from typing import Any, cast

from transformers import AutoModelForCausalLM, AutoTokenizer

from ivl_jax.integrations.transformers import TextMap, ValueLogits, load_torch_value
from ivl_jax.tokenizer_agreement import TokenizerMismatchError


def main():
    parser = argparse.ArgumentParser(description="Decode a base with a value network, in PyTorch.")
    parser.add_argument("base", help="Hugging Face folder or hub id of the base")
    parser.add_argument("value", help="value folder, hub id of one, or folder by export-hf")
    parser.add_argument("prompt")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--map", help="vocabulary map, where base and value have different tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--chat", action="store_true", help="use the chat template")
    chosen = parser.parse_args()
    base: Any = AutoModelForCausalLM.from_pretrained(chosen.base)
    of_base: Any = AutoTokenizer.from_pretrained(chosen.base)
    value, tokenizer = cast("tuple[Any, Any]", load_torch_value(chosen.value))
    text_map, of_value, stop_ids = None, tokenizer, value.generation_config.eos_token_id
    if chosen.map is not None:
        text_map = TextMap(chosen.map, of_base, tokenizer)
        tokenizer, stop_ids = of_base, text_map.stop_ids(stop_ids)
    try:
        processor = ValueLogits(
            [value],
            [chosen.strength],
            text_maps=[text_map],
            base_tokenizer=of_base,
            value_tokenizers=[of_value],
        )
    except TokenizerMismatchError as error:
        parser.error(f"{error}; its file is given with --map")
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
        eos_token_id=stop_ids,
        logits_processor=[processor],
    )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(new_tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
