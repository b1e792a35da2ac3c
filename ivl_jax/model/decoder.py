"""The decoder as pure functions over (graphdef, params): tokens in, fp32 logits out.

In: an `ArchConfig`; then a static graphdef, a nested dict of arrays, tokens and positions. Out:
hidden states, logits and the next cache. Base model and value network are two calls of these.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.kv_cache import KVCache, cache_capacity, visible_slots, write_slots
from ivl_jax.model.layers import Constrain, DecoderLayer, RMSNorm, rope_angles, soft_cap

Params = dict[str, Any]


class Embedding(nnx.Module):
    """Token embeddings, one row a vocabulary entry."""

    def __init__(self, rows: int, size: int, *, std: float, param_dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (rows, size)
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))


class Head(nnx.Module):
    """The output projection of an untied decoder, stored (in, out)."""

    def __init__(self, size: int, rows: int, *, std: float, param_dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (size, rows)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))


class Decoder(nnx.Module):
    """The parameters of a decoder and the static choices of how to run it."""

    def __init__(
        self,
        arch: ArchConfig,
        *,
        compute_dtype: DTypeLike,
        remat: bool,
        scan_layers: bool,
        vocab_rows: int,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat = remat
        self.scan_layers = scan_layers
        std = arch.initializer_range
        self.embed_tokens = Embedding(
            vocab_rows, arch.hidden_size, std=std, param_dtype=param_dtype, rngs=rngs
        )
        # Every layer has one structure, so the stacked form is a single layer with longer arrays.
        layers = [
            DecoderLayer(arch, param_dtype=param_dtype, rngs=rngs)
            for _ in range(1 if scan_layers else arch.num_hidden_layers)
        ]
        self.layers = layers[0] if scan_layers else nnx.List(layers)
        self.norm = RMSNorm(
            arch.hidden_size,
            eps=arch.rms_norm_eps,
            unit_offset=arch.unit_offset_norms,
            param_dtype=param_dtype,
        )
        if not arch.tie_word_embeddings:
            self.lm_head = Head(
                arch.hidden_size, vocab_rows, std=std, param_dtype=param_dtype, rngs=rngs
            )


@functools.cache
def build_decoder(
    arch: ArchConfig,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    scan_layers: bool = False,
) -> nnx.GraphDef:
    """The static half of a decoder: hashable, made once per argument set, free of arrays.

    Args:
        arch: The architecture.
        compute_dtype: Of activations and matmuls; norms, softmax and logits are fp32 whatever it is.
        remat: Recompute each layer's activations in the backward pass instead of keeping them.
        scan_layers: Run the layers as one `lax.scan`; params then hold them stacked
            (`stack_layers`) and so does the cache.

    Returns:
        The graphdef every function of this module takes beside params.
    """
    abstract = nnx.eval_shape(
        lambda: Decoder(
            arch,
            compute_dtype=compute_dtype,
            remat=remat,
            scan_layers=scan_layers,
            vocab_rows=arch.vocab_size,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    return nnx.split(abstract)[0]


def init_params(
    arch: ArchConfig,
    key: Key[Array, ""],
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    scan_layers: bool = False,
) -> Params:
    """Fresh parameters: normal(initializer_range) kernels and embeddings, zero biases, neutral norms.

    Args:
        arch: The architecture.
        key: A typed PRNG key; equal keys give equal parameters whatever `scan_layers` is.
        param_dtype: Dtype the parameters are stored in.
        vocab_rows: Rows of embedding and head; None: `arch.vocab_size`. More pads for a mesh.
        scan_layers: Stack the layers.

    Returns:
        A nested dict whose paths mirror Hugging Face's names.
    """
    decoder = Decoder(
        arch,
        compute_dtype=jnp.float32,
        remat=False,
        scan_layers=False,
        vocab_rows=arch.vocab_size if vocab_rows is None else vocab_rows,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(key),
    )
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    return stack_layers(params) if scan_layers else params


def abstract_params(
    arch: ArchConfig,
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    scan_layers: bool = False,
) -> Params:
    """Shapes and dtypes of `init_params`, as `jax.ShapeDtypeStruct`s; allocates nothing."""
    make = functools.partial(
        init_params,
        arch,
        param_dtype=param_dtype,
        vocab_rows=vocab_rows,
        scan_layers=scan_layers,
    )
    return jax.eval_shape(make, jax.random.key(0))


def stack_layers(params: Params) -> Params:
    """Layers `{0: …, 1: …}` as one subtree whose arrays have a leading layer axis."""
    layers = [params["layers"][index] for index in sorted(params["layers"])]
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {
        index: jax.tree.map(lambda leaf, at=index: leaf[at], params["layers"])
        for index in range(depth)
    }
    return params | {"layers": layers}


def untie_head(params: Params) -> Params:
    """Adds `lm_head.kernel`, the transposed embedding, where there is none; logits stay the same."""
    if "lm_head" in params:
        return params
    return params | {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}


def zero_head(params: Params) -> Params:
    """A decoder whose logits are all zero: its head, untied first where tied, set to zero."""
    untied = untie_head(params)
    return untied | {"lm_head": {"kernel": jnp.zeros_like(untied["lm_head"]["kernel"])}}


def embed(
    graphdef: nnx.GraphDef, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Token embeddings in the compute dtype, scaled where the family scales them.

    A token outside the embedding's rows gives NaN, never another token's row.
    """
    return _embed(_assemble(graphdef, params), tokens)


def embed_probabilities(
    graphdef: nnx.GraphDef, params: Params, probabilities: Float[Array, "B T V"]
) -> Float[Array, "B T D"]:
    """The expected token embedding under a distribution over tokens, scaled like `embed`.

    Args:
        graphdef: From `build_decoder`.
        params: Nested dict of arrays.
        probabilities: fp32; columns beyond the embedding's rows have no embedding and count as 0.

    Returns:
        Embeddings in the compute dtype.
    """
    decoder = _assemble(graphdef, params)
    rows = decoder.embed_tokens.embedding[...]
    width = min(rows.shape[0], probabilities.shape[-1])
    weights = probabilities[..., :width].astype(decoder.compute_dtype)
    mixed = jnp.einsum("btv,vd->btd", weights, rows[:width].astype(decoder.compute_dtype))
    return _scale_embeddings(decoder, mixed)


def hidden_states(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"] | None,
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    input_embeddings: Float[Array, "B T D"] | None = None,
    constrain: Constrain | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Runs the decoder up to its final norm.

    Without a cache, query t sees key s iff s ≤ t, both have the same segment id, and s is inside the
    layer's window. With one, keys and values are written at slot = position first, and a query at
    position p sees slots s ≤ p (and p − s < window): what lies beyond a row's length is masked until
    it is overwritten, so ragged right-padded prompts need no mask, and a smaller next position rolls
    the row back.

    Args:
        graphdef: From `build_decoder`.
        params: Nested dict of arrays; layers stacked iff the graphdef was built with `scan_layers`.
        tokens: Token ids; None when `input_embeddings` are given.
        positions: Position of each token in its own sequence; with a cache, also its slot.
        segment_ids: 0 padding, 1.. sequences packed in a row; None: one sequence. Not with a cache.
        cache: What earlier calls remembered; None: nothing is remembered.
        input_embeddings: Take the place of `embed(tokens)`; already scaled.
        constrain: Called with activations and their logical axes; adds sharding constraints.

    Returns:
        Hidden states after the final norm, in the compute dtype, and the new cache (None without).

    Raises:
        ValueError: Both or neither of tokens and embeddings, or segment ids beside a cache.
    """
    if (tokens is None) == (input_embeddings is None):
        raise ValueError("hidden_states takes either tokens or input_embeddings, and not both")
    if cache is not None and segment_ids is not None:
        raise ValueError(
            "hidden_states: segment_ids have no meaning with a cache (one row, one text)"
        )
    decoder = _assemble(graphdef, params)
    constrain = _unconstrained if constrain is None else constrain
    arch = decoder.arch
    x = _embed(decoder, tokens) if tokens is not None else input_embeddings
    x = constrain(x.astype(decoder.compute_dtype), ("batch", "length", "embed"))

    kinds = sorted(set(arch.layer_types))
    angles = {kind: _angles(arch, kind, positions) for kind in kinds}
    masks = {kind: _mask(arch, kind, positions, segment_ids, cache) for kind in kinds}
    run = _run_scanned if decoder.scan_layers else _run_unrolled
    x, cache = run(decoder, x, angles, masks, positions, cache, constrain)
    return decoder.norm(x), cache


def logits_from_hidden(
    graphdef: nnx.GraphDef, params: Params, hidden: Float[Array, "B T D"]
) -> Float32[Array, "B T V"]:
    """Logits of final hidden states, soft cap included.

    `lm_head.kernel` is used wherever params hold one, also for a tied architecture: a transposed
    copy of the embedding reads 15 times faster on CPU at T = 1.
    """
    decoder = _assemble(graphdef, params)
    dtype = decoder.compute_dtype
    if hasattr(decoder, "lm_head"):
        kernel, contraction = decoder.lm_head.kernel[...], "btd,dv->btv"
    else:
        kernel, contraction = decoder.embed_tokens.embedding[...], "btd,vd->btv"
    logits = jnp.einsum(
        contraction,
        hidden.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return soft_cap(logits, decoder.arch.final_logit_softcapping)


def forward(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float32[Array, "B T V"]:
    """Logits of whole sequences, without a cache; see `hidden_states` for who sees whom."""
    hidden, _ = hidden_states(
        graphdef, params, tokens, positions=positions, segment_ids=segment_ids
    )
    return logits_from_hidden(graphdef, params, hidden)


def _unconstrained(x: Array, axes: tuple[str, ...]) -> Array:
    del axes
    return x


def _assemble(graphdef: nnx.GraphDef, params: Params) -> Decoder:
    """The module again; a head that params carry beyond the architecture's is attached."""
    arch = dict(graphdef.attributes)["arch"].value
    if "lm_head" not in params or not arch.tie_word_embeddings:
        return nnx.merge(graphdef, params)
    trunk = {name: subtree for name, subtree in params.items() if name != "lm_head"}
    decoder = nnx.merge(graphdef, trunk)
    decoder.lm_head = nnx.eval_shape(
        lambda: Head(1, 1, std=1.0, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    decoder.lm_head.kernel = nnx.Param(params["lm_head"]["kernel"])
    return decoder


def _embed(decoder: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    dtype = decoder.compute_dtype
    rows = decoder.embed_tokens.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan)
    return _scale_embeddings(decoder, rows.astype(dtype))


def _scale_embeddings(decoder: Decoder, rows: Array) -> Array:
    if not decoder.arch.scale_embeddings:
        return rows
    # Gemma rounds the factor to the compute dtype (55.4256 to 55.5 in bf16), and so do its weights.
    return rows * jnp.asarray(decoder.arch.hidden_size**0.5, rows.dtype)


def _angles(arch: ArchConfig, kind: str, positions: Array) -> Float[Array, "B T H2"]:
    rope = arch.rope_parameters
    if kind == "sliding_attention" and arch.sliding_rope_parameters is not None:
        rope = arch.sliding_rope_parameters
    return rope_angles(positions, rope, head_dim=arch.head_dim)


def _mask(
    arch: ArchConfig,
    kind: str,
    positions: Array,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> Bool[Array, "_ 1 T S"]:
    window = arch.sliding_window if kind == "sliding_attention" else None
    if cache is not None:
        return visible_slots(positions, capacity=cache_capacity(cache), window=window)
    index = jnp.arange(positions.shape[1])
    distance = index[:, None] - index[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    visible = visible[None, None]
    if segment_ids is None:
        return visible
    return visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def _layer_step(decoder: Decoder, constrain: Constrain) -> Callable:
    """(state, x, angles, mask, remembered) -> (x, remembered), rematerialised if asked."""
    layer = decoder.layers if decoder.scan_layers else decoder.layers[0]
    structure = nnx.split(layer)[0]

    def step(state, x, angles, mask, positions, cached):
        written = cached

        def remember(key: Array, value: Array) -> tuple[Array, Array]:
            nonlocal written
            if cached is None:
                return key, value
            written = (
                write_slots(cached[0], key, positions),
                write_slots(cached[1], value, positions),
            )
            return written

        module = nnx.merge(structure, state)
        x = module(x, angles=angles, mask=mask, remember=remember, constrain=constrain)
        return x, written

    return jax.checkpoint(step) if decoder.remat else step


def _run_unrolled(decoder, x, angles, masks, positions, cache, constrain):
    step = _layer_step(decoder, constrain)
    keys, values = [], []
    for index, kind in enumerate(decoder.arch.layer_types):
        cached = None if cache is None else (cache.keys[index], cache.values[index])
        state = nnx.split(decoder.layers[index])[1]
        x, cached = step(state, x, angles[kind], masks[kind], positions, cached)
        if cached is not None:
            keys.append(cached[0])
            values.append(cached[1])
    return x, None if cache is None else KVCache(tuple(keys), tuple(values))


def _run_scanned(decoder, x, angles, masks, positions, cache, constrain):
    step = _layer_step(decoder, constrain)
    kinds = sorted(masks)
    kind_of_layer = jnp.asarray([kinds.index(kind) for kind in decoder.arch.layer_types])
    all_angles = jnp.stack([angles[kind] for kind in kinds])
    all_masks = jnp.stack([masks[kind] for kind in kinds])

    def body(x, inputs):
        state, kind, cached = inputs
        return step(state, x, all_angles[kind], all_masks[kind], positions, cached)

    state = nnx.split(decoder.layers)[1]
    cached = None if cache is None else (cache.keys, cache.values)
    x, cached = jax.lax.scan(body, x, (state, kind_of_layer, cached))
    return x, None if cached is None else KVCache(*cached)
