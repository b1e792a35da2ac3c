"""Composition across vocabularies, plainly: at each step all text is read and run from scratch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.pieces import PieceEncoder
from ivl_jax.decoding.compose import compose
from ivl_jax.model.decoder import build_decoder, hidden_states, logits_from_hidden
from ivl_jax.vocabulary.mapping import DescribedMap, MapMetadata, VocabularyMap
from ivl_jax.vocabulary.special_tokens import pair_special_tokens

PADDED = 192


def random_map(base, value, *, seed=0, centred=False, entries=None):
    """Most base tokens to a random value token, or several, with random weights."""
    rng = np.random.default_rng(seed)
    size, value_size = base.tokenizer_info.vocab_size, value.tokenizer_info.vocab_size
    shape = (size,) if entries is None else (size, entries)
    index = rng.integers(0, value_size, shape).astype(np.int32)
    weight = np.where(rng.random(shape) < 0.8, rng.random(shape), 0.0).astype(np.float32)
    infos = base.tokenizer_info, value.tokenizer_info
    pairs = pair_special_tokens(*infos, base_name="b", value_name="v")
    for _, base_id, value_id in pairs:
        index[base_id], weight[base_id] = value_id, 1.0
    metadata = MapMetadata(
        method="bytes",
        base_name="b",
        base_fingerprint=infos[0].fingerprint,
        value_name="v",
        value_fingerprint=infos[1].fingerprint,
        value_vocab_size=value_size,
        centred=centred,
        token_coverage=0.8,
        text_coverage=0.8,
        texts=1,
        special_pairs=pairs,
    )
    return DescribedMap(VocabularyMap(jnp.asarray(index), jnp.asarray(weight)), metadata, "MAP")


def compose_beside(base, *values, **options):
    """A composed model that keeps base and values as they were loaded, to be read anew from."""
    model = compose(base, *values, **options)
    return dataclasses.replace(model, base=base, values=values)


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(arch, params, tokens, length):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    decoder = build_decoder(arch)
    hidden, _ = hidden_states(decoder, params, tokens, positions=positions)
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
    return logits_from_hidden(decoder, params, last)[0, 0]


def last_logits(network, ids):
    """[V] real columns, from one pass over all of a text, without a cache."""
    padded = np.zeros((1, PADDED), np.int32)
    padded[0, : len(ids)] = ids
    logits = _last_logits(network.arch, network.params, padded, np.int32(len(ids)))
    return np.asarray(logits)[: network.tokenizer_info.vocab_size]


def whole_text(spelled):
    """Bytes as text, up to where they end inside a character."""
    for cut in range(4):
        try:
            kept = spelled[: len(spelled) - cut]
            tail = spelled[len(kept) :]
            tail.decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return kept.decode(errors="replace")
    return spelled.decode(errors="replace")


def read_anew(model, index, prompt, base_ids):
    """All that the base has read, in a value network's own tokens, by its own tokenizer's call."""
    if isinstance(prompt, list):
        return read_dialogue_anew(model, index, prompt, base_ids)
    value, own = model.values[index], model.own_vocabularies[index]
    pairs = {base_id: value_id for _, base_id, value_id in own.special_pairs}
    begins = model.base.tokenizer_info.bos_id, value.tokenizer_info.bos_id
    puts_space = model.strips_leading_space
    source = model.own_vocabularies[index].retokenizer.source
    ids, spelled, fresh, after_special = [], b"", True, False

    def flush(final):
        nonlocal ids, spelled, fresh
        text = spelled.decode(errors="replace") if final else whole_text(spelled)
        if fresh and puts_space:
            text = text.removeprefix(" ")
        call = value.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids += call["input_ids"] if text else []
        spelled, fresh = b"", True

    for place, base_id in enumerate(base_ids):
        paired = begins[1] if (place, base_id) == (0, begins[0]) else pairs.get(base_id)
        if paired is None:
            piece = model.token_bytes[base_id]
            # The space that some tokenizers put after each special token is not text.
            spelled += piece.removeprefix(b" ") if after_special else piece
            special = base_id in source.special_ids and source.prefix == "every"
            after_special = special or (after_special and not piece)
        else:
            after_special = False
            flush(final=True)
            ids.append(paired)
    flush(final=False)
    beginning = value.tokenizer("")["input_ids"][:1]
    if beginning and ids[:1] != beginning:
        ids = beginning + ids
    return ids or [begins[1]]


# Making one of 32,000 tokens takes 0.4 s: what is anew is the reading, not the tokenizer.
_piece_encoder = functools.cache(PieceEncoder)
_chat_format = functools.cache(make_chat_format)


def read_dialogue_anew(model, index, messages, base_ids):
    """A dialogue in the value's own template and tokens, then what the base has said since."""
    value = model.values[index]
    own = _chat_format(value.tokenizer, template="auto").encode_prompt(messages).tolist()
    said = base_ids[len(model.encode(messages)) :]
    text = whole_text(b"".join(model.token_bytes[base_id] for base_id in said))
    _, piece = _piece_encoder(value.tokenizer).encode([["Answer:", text]])[0]
    return own + piece.ids


def step_anew(model, maps, prompt, base_ids, strengths):
    """Composed logits [V] after these base tokens, everything read from scratch; all in NumPy."""
    total = last_logits(model.base, base_ids)
    for index, value in enumerate(model.values):
        if maps[index] is None:
            total = total + strengths[index] * last_logits(value, base_ids)
            continue
        found, weight = (np.asarray(array) for array in maps[index].vocabulary_map)
        logits = last_logits(value, read_anew(model, index, prompt, base_ids))
        if maps[index].metadata.centred:
            logits = logits - logits[np.unique(found[weight != 0])].mean()
        each = np.where(weight != 0, weight * logits[found], 0)
        total = total + strengths[index] * each.reshape(len(each), -1).sum(axis=1)
    return total
