"""A composed model as a model of bytes: exact next-byte distributions after a prompt.

In: a composed model whose networks share one vocabulary, a prompt's token ids. Out: `BytePaths`.
Every distribution runs the networks over the whole text: for reference figures, not for use.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ivl_jax.buckets import bucket
from ivl_jax.composed.forward import compose, network_logits, pick, run_networks
from ivl_jax.composed.network import Composition
from ivl_jax.composed.strength_policies import rows_of
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.vocabulary.byte_paths import BytePaths, ByteVocabulary

_SMALLEST_LENGTH = 64
_BATCHES = (1, 4, 16, 64)  # few programs are compiled


class ByteReader:
    """Begins texts under a composed model, byte by byte.

    Args:
        model: the model, with its own strengths.

    Raises:
        ValueError: a value network has its own vocabulary.
    """

    def __init__(self, model: ComposedModel) -> None:
        if model.composition.mapped:
            raise ValueError(
                "exact byte-level distributions need networks of one vocabulary, but a value "
                "network has a vocabulary map: read it beside its own training base"
            )
        self._model = model
        self._vocabulary = ByteVocabulary(model.token_bytes, model.stop_ids)

    def begin(self, prompt_ids: Sequence[int], *, prune: float = 0.0) -> BytePaths:
        """Begin a text after a prompt, whose tokens are given.

        Args:
            prompt_ids: the prompt, at least one token.
            prune: as `BytePaths` takes it.

        Returns:
            The text, still empty; at most the model's context of tokens may follow.
        """
        prompt = list(prompt_ids)

        def next_log_probs(texts: Sequence[tuple[int, ...]]) -> Float[np.ndarray, "N V"]:
            most = _BATCHES[-1]
            parts = [
                self._run([[*prompt, *ids] for ids in texts[start : start + most]])
                for start in range(0, len(texts), most)
            ]
            return np.concatenate(parts)

        return BytePaths(self._vocabulary, next_log_probs, prune=prune)

    def _run(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "N V"]:
        """Log-probabilities of the token after each row."""
        model, longest = self._model, max(map(len, rows))
        if longest > model.context:
            raise ValueError(
                f"a text of {longest} tokens is longer than the context of {model.context} tokens "
                f"(that of {model.context_of}): score a shorter one"
            )
        batch = next(size for size in _BATCHES if size >= len(rows))
        length = bucket(longest, smallest=_SMALLEST_LENGTH, largest=model.context)
        tokens, lengths = np.zeros((batch, length), np.int32), np.ones(batch, np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        strengths = np.asarray([model.strengths], np.float32)
        policies = rows_of(model.policy)
        run = _program(model.composition)
        found = run(model.params, tokens, lengths, strengths, policies)
        return np.asarray(found)[: len(rows), : len(model.token_bytes)]


@functools.cache
def _program(composition: Composition) -> Callable[..., Any]:
    """The log-probabilities of the token after each row; jitted only here."""

    def program(params: Any, tokens: Any, lengths: Any, strengths: Any, policies: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = run_networks(composition, params, tokens, positions=positions)
        last = pick(composition, hidden, lengths[:, None] - 1)
        logits = network_logits(composition, params, last)
        composed = compose(
            composition, params.values, logits, strengths=strengths, policies=policies
        )[:, 0]
        return jax.nn.log_softmax(composed, axis=-1)

    return jax.jit(program)
