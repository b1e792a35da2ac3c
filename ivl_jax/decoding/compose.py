"""Composing value networks with a base model: all checks, and the placement of the arrays.

In: a loaded base, loaded value networks, a mesh. Out: a `ComposedModel` that generates. A language
model may take a value network's place: its logits are added like theirs (proxy-tuning).
"""

import dataclasses
import logging
import numbers
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.compatibility import ComposedSources, check_sources
from ivl_jax.composed.kernel_form import lay_out_network, loading_form, output_rows
from ivl_jax.composed.network import (
    ComposedParams,
    Composition,
    DraftArrays,
    Layout,
    Network,
    ValueArrays,
)
from ivl_jax.composed.sources import NO_SCHEMES, ModelSource, Schemes
from ivl_jax.composed.strength_policies import check_policy
from ivl_jax.config import (
    FULL_STRENGTH,
    LONGEST_DRAFT,
    NGRAM_DRAFT,
    StrengthPolicy,
    strength_problem,
)
from ivl_jax.decoding.device.shardings import replicated_cache
from ivl_jax.decoding.given_models import is_path, language_model_source, value_source
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.prompts import make_prompt_reader
from ivl_jax.decoding.speculative.ngram_proposer import NGRAM_PROPOSER
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

logger = logging.getLogger(__name__)


def compose(
    base: LanguageModel | epath.PathLike,
    *values: ValueNetwork | LanguageModel | epath.PathLike,
    strengths: float | Sequence[float] = (),
    policy: StrengthPolicy = FULL_STRENGTH,
    maps: epath.PathLike | DescribedMap | Sequence[epath.PathLike | DescribedMap | None] = (),
    schemes: Schemes = NO_SCHEMES,
    value_models: epath.PathLike | Sequence[epath.PathLike] = (),
    mesh: Mesh | None = None,
    base_rules: ShardingRules = DEFAULT_RULES,
    value_rules: ShardingRules = DEFAULT_RULES,
    draft: LanguageModel | epath.PathLike | None = None,
    draft_length: int = 0,
    int8_base: bool = False,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
) -> ComposedModel:
    """Compose value networks with a base model: z = z_base + Σ α · z_value.

        compose("meta-llama/Llama-2-13b-hf", "runs/mine/value", strengths=0.8)

    Args:
        base: the base model: loaded, or its folder or hub id. Models given by path are checked
            before any weights are read, and each of their weights is held once, in the form it
            decodes in.
        values: value networks, loaded or their folders; none gives the base alone. A language model
            counts as a value network that reads only the text: `compose(base, tuned, untuned,
            strengths=(α, −α))` is proxy-tuning.
        strengths: α of each value network, or one number for all; empty: 1 each.
        policy: how much of the strengths applies at each position.
        maps: for each value network, the vocabulary map between the base's tokenizer and its own,
            as a file or already read; None for those that share the base's. Empty: all do.
        schemes: connection schemes of your own that value folders name, by the name they have
            there.
        value_models: folders or hub ids of the models that LoRA values given by path belong to, in
            any order; empty: where the value folders say.
        mesh: devices to decode on; None: the device where the parameters are. Parameters that
            are not sharded by the rules are moved.
        base_rules: the base's sharding on the mesh.
        value_rules: the value networks' sharding on the mesh; it may differ from the base's.
        draft: a small base of the same family that proposes tokens under the same value networks,
            but for those with a map, loaded or by its path; or `ngram`, which proposes what
            followed the last tokens earlier in the text. Greedy text stays the same but for
            near-ties, samples keep their distribution.
        draft_length: tokens it proposes at a time; 0: chosen for speed, none where it slows down.
        int8_base: round the base's kernels to int8: a quarter of their float32 memory, and faster
            where memory is what decoding waits for.
        param_dtype: float32, bfloat16 or float16, for models given by path.
        compute_dtype: of activations, products and caches; None: for each network the dtype that
            its parameters are held in.

    Returns:
        A model that generates.

    Raises:
        TypeError: something that is neither a model nor the path of one.
        FileNotFoundError: no model at a path.
        TokenizerMismatchError: base and a value network disagree on tokens both have; it gives the
            command that builds a map between them.
        VocabularyMapError: a map that cannot be read, or that was built for other tokenizers.
        ValueError: no such strength policy; or the number of strengths or maps is neither 0 nor
            that of the value networks; or a value network with a map reads base logits (only the
            residual scheme reads just the text); or there is a draft and a value network that
            reads base logits.
    """
    ngrams = isinstance(draft, str) and draft == NGRAM_DRAFT
    if ngrams:
        draft = None
    alphas = _strengths_of(strengths, number=len(values))
    check_policy(policy, where="policy")
    given_maps = [maps] if isinstance(maps, str | os.PathLike | DescribedMap) else list(maps)
    if given_maps and len(given_maps) != len(values):
        raise ValueError(f"{len(given_maps)} maps for {len(values)} value network(s)")
    described = [_described(given) for given in given_maps] or [None] * len(values)
    given = [value_models] if isinstance(value_models, str | os.PathLike) else value_models
    adapted = [os.fspath(path) for path in given]
    sources = check_sources(
        language_model_source(base, "the base"),
        [
            value_source(value, index, described_map=one_map, schemes=schemes, models=adapted)
            for index, (value, one_map) in enumerate(zip(values, described, strict=True))
        ],
        draft=None if draft is None else language_model_source(draft, "the draft"),
        ngrams=ngrams,
    )

    def loaded(given: Any, source: ModelSource, rules: ShardingRules, *, int8: bool = False) -> Any:
        if not is_path(given):
            return given
        form = loading_form(mesh, int8=int8)
        return source.load(param_dtype=param_dtype, form=form, mesh=mesh, sharding_rules=rules)

    # The values first: they are small, and a damaged one is found before the base is read.
    networks = [loaded(*pair, value_rules) for pair in zip(values, sources.values, strict=True)]
    return compose_loaded(
        sources,
        loaded(base, sources.base, base_rules, int8=int8_base),
        networks,
        sources.draft and loaded(draft, sources.draft, value_rules),
        strengths=alphas,
        policy=policy,
        mesh=mesh,
        base_rules=base_rules,
        value_rules=value_rules,
        draft_length=draft_length,
        int8_base=int8_base,
        compute_dtype=compute_dtype,
    )


def compose_loaded(
    sources: ComposedSources,
    base: LanguageModel,
    values: Sequence[ValueNetwork | LanguageModel],
    draft: LanguageModel | None,
    *,
    strengths: Sequence[float],
    policy: StrengthPolicy,
    mesh: Mesh | None,
    base_rules: ShardingRules,
    value_rules: ShardingRules,
    draft_length: int,
    int8_base: bool,
    compute_dtype: DTypeLike | None = None,
) -> ComposedModel:
    """Compose loaded value networks with a loaded base, checked against each other before.

    Args:
        sources: the models before their weights.
        base: the base, loaded.
        values: the value networks, loaded, in the order of the sources.
        draft: the draft, loaded, or None.
        strengths: as `compose` takes them, like the rest.
        policy: checked before.
        mesh: devices to decode on.
        base_rules: the base's layout on the mesh.
        value_rules: the value networks' layout on the mesh.
        draft_length: tokens that the draft proposes at a time.
        int8_base: round the base's kernels to int8.
        compute_dtype: as `compose` takes it.

    Returns:
        A model that generates.

    Raises:
        ValueError: the number of strengths is neither 0 nor that of the value networks, or
            `draft_length` is out of range.
    """
    if strengths and len(strengths) != len(values):
        raise ValueError(f"{len(strengths)} strengths for {len(values)} value network(s)")
    if not 0 <= draft_length <= LONGEST_DRAFT:
        raise ValueError(f"draft_length must be in [0, {LONGEST_DRAFT}], got {draft_length}")
    layout = None if mesh is None else Layout(mesh, base_rules)
    value_layout = None if mesh is None else Layout(mesh, value_rules)
    base_network, base_params = _network(base, sources.base, layout, compute_dtype, int8=int8_base)
    each = zip(values, sources.values, sources.unknown_ids, strict=True)
    arranged = [
        arrange_value(*one, layout=value_layout, compute_dtype=compute_dtype) for one in each
    ]
    proposer = NGRAM_PROPOSER if sources.ngrams else None
    # As small as the values, and read as often: it is sharded as they are.
    draft_network, draft_arrays = None, None
    if draft is not None:
        assert sources.draft is not None
        draft_network, draft_params = _network(draft, sources.draft, value_layout, compute_dtype)
        unknown = jnp.asarray(sources.draft_unknown_ids, jnp.int32)
        draft_arrays = DraftArrays(draft_params, unknown)
    composition = Composition(
        base_network,
        tuple(network for network, _ in arranged),
        draft_network,
        draft_length if draft is not None or sources.ngrams else 0,
    )
    _report_replicated_caches(composition, sources)
    return ComposedModel(
        composition=composition,
        params=ComposedParams(
            base_params,
            tuple(arrays for _, arrays in arranged),
            draft_arrays,
        ),
        programs=build_programs(composition, proposer),
        strengths=tuple(float(alpha) for alpha in strengths) or (1.0,) * len(values),
        policy=policy,
        prompts=make_prompt_reader(sources),
        # Drop the arrays that they came with, or every weight would be held twice.
        base=dataclasses.replace(base, params=base_params),
        values=tuple(
            dataclasses.replace(value, params=arrays.params)
            for value, (_, arrays) in zip(values, arranged, strict=True)
        ),
        token_bytes=spoken_bytes(base.tokenizer, base.tokenizer_info),
        strips_leading_space=_strips_leading_space(base.tokenizer, base.tokenizer_info),
        proposer=proposer,
    )


def _report_replicated_caches(composition: Composition, sources: ComposedSources) -> None:
    networks = [composition.base, *composition.values]
    models = [sources.base, *sources.values]
    if composition.draft is not None and sources.draft is not None:
        networks.append(composition.draft)
        models.append(sources.draft)
    for network, model in zip(networks, models, strict=True):
        if cost := replicated_cache(network):
            logger.warning("%s: %s", model.label, cost)


def _network(
    model: LanguageModel | ValueNetwork,
    source: ModelSource,
    layout: Layout | None,
    compute_dtype: DTypeLike | None,
    *,
    int8: bool = False,
) -> tuple[Network, Params]:
    """A network's static half, and its parameters as they are held for decoding."""
    info = source.info
    graphdef, params = lay_out_network(
        model.params, model.arch, layout, int8=int8, compute_dtype=compute_dtype
    )
    network = Network(
        graphdef=graphdef,
        arch=model.arch,
        vocab_size=min(info.vocab_size, output_rows(model.params)),
        cache_dtype=str(jnp.dtype(compute_dtype or jax.tree.leaves(params)[0].dtype)),
        replacement_id=info.replacement_id,
        layout=layout,
    )
    return network, params


def arrange_value(
    value: LanguageModel | ValueNetwork,
    source: ModelSource,
    unknown_ids: Sequence[int],
    *,
    layout: Layout | None,
    compute_dtype: DTypeLike | None = None,
) -> tuple[Network, ValueArrays]:
    """Arrange a value network for decoding.

    Args:
        value: the network, loaded.
        source: the network before its weights, with its map.
        unknown_ids: base ids that it does not know.
        layout: of value networks on the mesh; None: one device.
        compute_dtype: as `compose` takes it.

    Returns:
        Its static half and its arrays, as a composition has them.
    """
    network, params = _network(value, source, layout, compute_dtype)
    described_map = source.described_map
    connected = dataclasses.replace(
        network,
        scheme=source.scheme,
        mapped=described_map is not None,
        centred=described_map is not None and described_map.metadata.centred,
    )
    ids = jnp.asarray(unknown_ids, jnp.int32)
    return connected, ValueArrays(params, ids, described_map and described_map.vocabulary_map)


def _strengths_of(given: Any, *, number: int) -> tuple[float, ...]:
    """α of each value network; a single number applies to all."""
    each = (given,) * max(number, 1) if isinstance(given, numbers.Real) else tuple(given)
    for alpha in each:
        if not isinstance(alpha, numbers.Real):
            raise TypeError(f"strengths: expected numbers, got {alpha!r:.60}")
        if problem := strength_problem(cast(float, alpha)):
            raise ValueError(f"strengths {problem}")
    return tuple(float(alpha) for alpha in each)


def _described(given: epath.PathLike | DescribedMap | None) -> DescribedMap | None:
    if given is None or isinstance(given, DescribedMap):
        return given
    return read_map(given)


def _strips_leading_space(tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> bool:
    word_starts = (
        i
        for i, ordinary in enumerate(info.ordinary_tokens)
        if ordinary and ordinary[:1] == b" " and ordinary.isascii() and len(ordinary) > 1
    )
    first = next(word_starts, None)
    return first is not None and not str(tokenizer.decode([first])).startswith(" ")
