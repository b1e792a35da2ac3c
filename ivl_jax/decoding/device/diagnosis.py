"""Which network is to blame when a row ends because its logits are not finite.

In: a state some of whose rows have failed. Out: one flag per row and network. It runs the networks
again over each row's last token, and only once a row has failed: decoding itself just looks whether
the largest composed logit is a number.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ivl_jax.composed.forward import OwnTokens, network_logits, pick, run_networks
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.generate import compose_requested
from ivl_jax.decoding.device.sampling import are_finite
from ivl_jax.decoding.device.state import DecodeState


def finite_networks(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    own_tokens: tuple[OwnTokens, ...] = (),
) -> Bool[Array, "B N"]:
    """Look at every network's logits after each row's last token.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are; left as it is.
        own_tokens: what each value network with its own vocabulary reads: at least its last token.

    Returns:
        [B 1 + M + 1] whether all logits of the base, of each value network, and of their
        composition are finite, padding columns apart.
    """
    tokens = state.last_tokens[:, None]
    hidden, _ = run_networks(
        composition,
        params,
        tokens,
        positions=state.last_positions[:, None],
        caches=state.caches,
        own_texts=own_tokens,
    )
    picked = pick(composition, hidden, jnp.zeros_like(tokens), own_tokens)
    logits = network_logits(composition, params, picked)
    composed = compose_requested(composition, params, logits, state.requests)
    networks = (composition.base, *composition.values)
    flags = [
        jnp.all(jnp.isfinite(each[:, 0, : network.vocab_size]), axis=-1)
        for network, each in zip(networks, (logits.base, *logits.values), strict=True)
    ]
    return jnp.stack([*flags, are_finite(composed[:, 0])], axis=1)
