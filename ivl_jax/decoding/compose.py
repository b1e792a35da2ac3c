"""Putting value networks on a base model: every check, and the layout of the arrays, once.

In: a loaded base, loaded value networks, a mesh. Out: a `ComposedModel` that generates. A language
model may take a value network's place: its logits are added like theirs (proxy-tuning).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.compatibility import check_draft_fit, check_fit
from ivl_jax.composed.kernel_form import lay_out_network, output_rows
from ivl_jax.composed.network import (
    ComposedParams,
    Composition,
    DraftArrays,
    Layout,
    Network,
    ValueArrays,
)
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.decoding.device.programs import build_programs
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompts import make_prompt_reader, text_side
from ivl_jax.model.decoder import Params
from ivl_jax.sharding import DEFAULT_RULES, ShardingRules
from ivl_jax.text_codec import spoken_bytes
from ivl_jax.tokenizer import TokenizerInfo
from ivl_jax.vocabulary.mapping import DescribedMap, read_map
from ivl_jax.weights.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any


def compose(
    base: LanguageModel,
    *values: ValueNetwork | LanguageModel,
    strengths: Sequence[float] = (),
    maps: Sequence[epath.PathLike | DescribedMap | None] = (),
    mesh: Mesh | None = None,
    base_rules: ShardingRules = DEFAULT_RULES,
    value_rules: ShardingRules = DEFAULT_RULES,
    draft: LanguageModel | None = None,
    draft_length: int = 0,
    int8_base: bool = False,
) -> ComposedModel:
    """Put value networks on a base model: z = z_base + Σ α · z_value.

    Args:
        base: the base model.
        values: value networks; none gives the base alone. A language model counts as one that reads
            the text only: `compose(base, tuned, untuned, strengths=(α, −α))` is proxy-tuning.
        strengths: α of each value network; empty: 1 each.
        maps: for each value network, the vocabulary map between the base's tokenizer and its own,
            as a file or read already; None for those that share the base's. Empty: all do.
        mesh: devices to decode on; None: the device where the parameters are. Parameters that do
            not lie as the rules say are moved there.
        base_rules: the base's layout on the mesh.
        value_rules: the value networks' layout on the mesh; it may differ from the base's.
        draft: a small base of the same family that proposes tokens under the same value networks.
            Greedy text stays the same but for near-ties, samples keep their distribution.
        draft_length: tokens it proposes at a time; 0: as many as pay, none where it slows down.
        int8_base: round the base's kernels to int8: a quarter of their float32 memory, and faster
            where memory is what decoding waits for.

    Returns:
        A model that generates. Computation runs in the dtype each network's parameters are held in.

    Raises:
        TokenizerMismatchError: base and a value network disagree on tokens both have; it gives the
            command that builds a map between them.
        VocabularyMapError: a map that cannot be read, or that was built for other tokenizers.
        ValueError: as many strengths, and maps, as value networks, or none, are needed; or a value
            network with a map reads base logits (only the residual scheme reads no more than text);
            or a draft beside a value network that reads base logits or has a map.
    """
    for what, given in (("strengths", strengths), ("maps", maps)):
        if given and len(given) != len(values):
            raise ValueError(f"{len(given)} {what} for {len(values)} value network(s)")
    base_side = text_side(base, f"the base {base.path}")
    sides = [text_side(value, _value_name(value, index)) for index, value in enumerate(values)]
    described = [_described(given) for given in maps] or [None] * len(values)
    schemes = [scheme_of(value) for value in values]
    unknown = [
        check_fit(base_side.side, each.side, scheme=scheme, described_map=one_map)
        for each, scheme, one_map in zip(sides, schemes, described, strict=True)
    ]
    draft_side, draft_unknown = None, ()
    if draft is not None:
        draft_side = text_side(draft, f"the draft {draft.path}")
        names = [each.side.name for each in sides]
        facts = list(zip(names, schemes, described, strict=True))
        draft_unknown = check_draft_fit(base_side.side, draft_side.side, facts)
    layout = None if mesh is None else Layout(mesh, base_rules)
    value_layout = None if mesh is None else Layout(mesh, value_rules)
    base_network, base_params = _network(base, None, layout, int8=int8_base)
    laid_out = [
        _network(value, scheme, value_layout, one_map)
        for value, scheme, one_map in zip(values, schemes, described, strict=True)
    ]
    # As small as the values, and read as often: it lies where they do.
    draft_network, draft_arrays = None, None
    if draft is not None:
        draft_network, draft_params = _network(draft, None, value_layout)
        draft_arrays = DraftArrays(draft_params, jnp.asarray(draft_unknown, jnp.int32))
    composition = Composition(
        base_network,
        tuple(network for network, _ in laid_out),
        draft_network,
        draft_length if draft is not None else 0,
    )
    return ComposedModel(
        composition=composition,
        params=ComposedParams(
            base_params,
            tuple(
                ValueArrays(
                    params,
                    jnp.asarray(ids, jnp.int32),
                    None if one_map is None else one_map.vocabulary_map,
                )
                for (_, params), ids, one_map in zip(laid_out, unknown, described, strict=True)
            ),
            draft_arrays,
        ),
        programs=build_programs(composition),
        strengths=tuple(float(alpha) for alpha in strengths) or (1.0,) * len(values),
        prompts=make_prompt_reader(base_side, sides, described, draft=draft_side),
        # The arrays they came with are theirs no longer: kept, every weight would be held twice.
        base=dataclasses.replace(base, params=base_params),
        values=tuple(
            dataclasses.replace(value, params=params)
            for value, (_, params) in zip(values, laid_out, strict=True)
        ),
        token_bytes=spoken_bytes(base.tokenizer, base.tokenizer_info),
        strips_leading_space=_strips_leading_space(base.tokenizer, base.tokenizer_info),
    )


def _network(
    model: LanguageModel | ValueNetwork,
    scheme: ConnectionScheme | None,
    layout: Layout | None,
    described_map: DescribedMap | None = None,
    *,
    int8: bool = False,
) -> tuple[Network, Params]:
    """A network's static half, and its parameters as they lie for decoding."""
    info = model.tokenizer_info
    graphdef, params = lay_out_network(model.params, model.arch, layout, int8=int8)
    # A value reads its unknown token where the text has one it never saw, else a text's beginning.
    readable = (info.unk_id, info.bos_id, *info.eos_ids, 0)
    network = Network(
        graphdef=graphdef,
        arch=model.arch,
        vocab_size=min(info.vocab_size, output_rows(model.params)),
        cache_dtype=str(jax.tree.leaves(params)[0].dtype),
        scheme=scheme,
        replacement_id=next(i for i in readable if i is not None),
        layout=layout,
        mapped=described_map is not None,
        centred=described_map is not None and described_map.metadata.centred,
    )
    return network, params


def _described(given: epath.PathLike | DescribedMap | None) -> DescribedMap | None:
    if given is None or isinstance(given, DescribedMap):
        return given
    return read_map(given)


def scheme_of(value: ValueNetwork | LanguageModel) -> ConnectionScheme:
    """A language model reads the text, like a value network of the residual scheme."""
    return SCHEMES["residual" if isinstance(value, LanguageModel) else value.connection]


def _value_name(value: ValueNetwork | LanguageModel, index: int) -> str:
    if isinstance(value, LanguageModel):
        return f"value network {index + 1} (the language model {value.path})"
    trained_on = value.metadata.training_base.get("name", "an unnamed base")
    return f"value network {index + 1} (trained on {trained_on})"


def _strips_leading_space(tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> bool:
    word_starts = (
        i
        for i, ordinary in enumerate(info.ordinary_tokens)
        if ordinary and ordinary[:1] == b" " and ordinary.isascii() and len(ordinary) > 1
    )
    first = next(word_starts, None)
    return first is not None and not str(tokenizer.decode([first])).startswith(" ")
