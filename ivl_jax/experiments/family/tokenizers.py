"""The family's two tokenizers, trained on its own corpus.

In: texts. Out: a folder of tokenizer files with a chat template of ordinary tokens only, so that
chats have no tokens that the family's models never saw in pre-training.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTEXT = 256

# The eos that ends an answer is the one that ends every document of the pre-training text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\nAnswer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n' }}"
    "{% endif %}{% endfor %}"
)


def train_byte_tokenizer(texts: Iterable[str], *, entries: int) -> Tokenizer:
    """Byte-level BPE like GPT-2's: the tokenizer of S and L."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_word_tokenizer(texts: Iterable[str], *, entries: int) -> Tokenizer:
    """BPE with marked word starts and byte fallback, like Llama 2's: the tokenizer of X.

    It differs from the other in alphabet, special tokens and word boundaries: a line break stays
    with the indentation after it, digits are separate, and words break at underscores and capitals.
    """
    cuts = Regex(r"\n[\n ]*| ?[A-Z]?[a-z]+| ?[A-Z]+(?![a-z])| ?[0-9]| +(?! )| ?[^\s\w]+|.")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(cuts, behavior="isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=specials + fallback,
        limit_alphabet=200,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer can only reserve the byte tokens as special ones, but they are ordinary tokens.
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [
        token for token in record["added_tokens"] if token["content"] in specials
    ]
    return Tokenizer.from_str(json.dumps(record))


def wrap_tokenizer(tokenizer: Tokenizer, *, bos: str, eos: str) -> PreTrainedTokenizerFast:
    """The transformers tokenizer, with special tokens by role and the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=AddedToken(bos, special=True, normalized=False),
        eos_token=AddedToken(eos, special=True, normalized=False),
        pad_token=AddedToken(eos, special=True, normalized=False),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        add_bos_token=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_wrapped_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which contains the chat template."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
