"""The models of a run: their folders, whether they fit, and their parameters on the mesh.

In: the config's model tables. Out: first what is cheap (architectures, tokenizers, every check);
later, when everything else has been checked, the parameters.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, DTypeLike, Key

from ivl_jax.composed.attention import attention_on_mesh
from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.composed.network import Layout
from ivl_jax.composed.sources import ModelSource, read_language_model
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.config import BaseConfig, ConfigError, LayoutName, TrainConfig
from ivl_jax.extensions import load_extension
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.attention.form import AttentionForm
from ivl_jax.model.decoder import ADDITIONS, Params, zero_additions
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import Architecture, abstract_network, init_network
from ivl_jax.model.projection import AS_TRAINED, KernelForm, Lora
from ivl_jax.sharding import LAYOUTS, padded_vocab_rows, parameter_shardings
from ivl_jax.tokenizer_agreement import check_compatible
from ivl_jax.training.limits import check_context, check_depths, check_linear_map
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.teacher import TeacherReader, read_teacher
from ivl_jax.training.trained_source import AdapterReader, ModelReader, read_adapter, read_trained
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.language_model import check_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenBase:
    """A base that the value network is trained with, before its weights are read."""

    model: ModelSource
    config: BaseConfig
    unknown_ids: tuple[int, ...]
    """Its ids that the value network does not know."""


@dataclass(frozen=True)
class Models:
    """The trained model and its bases."""

    trained: ModelSource
    """The source of the trained model's tokenizer, and usually of its architecture and weights."""
    arch: Architecture
    """Of the trained model: that of `trained`, untied if its head is replaced; or a linear map of
    base logits."""
    bases: tuple[FrozenBase, ...]
    """The frozen bases; empty if a model is fine-tuned without one."""
    scheme: ConnectionScheme | None = None
    """How the trained model is connected to a base; None without a base."""
    teacher: ComposedSources | None = None
    """The teacher of a distillation; None: there is none."""
    original: FrozenBase | None = None
    """The model that is trained alone, as it was before the run, where the objective needs it as
    the reference."""
    lora: Lora | None = None
    """The adapter that is trained, of `trained` frozen; None: all parameters are trained."""
    adapter: ModelSource | None = None
    """The LoRA value folder whose adapter is trained further; None: a new adapter."""


@dataclass(frozen=True)
class Placement:
    """Where one model's parameters live on the mesh."""

    shapes: Params
    """ShapeDtypeStructs."""
    shardings: Params
    unstacked_shardings: Params
    """In the layout of the files, one subtree per layer."""
    vocab_rows: int
    scan_layers: bool


def read_model(path: str, revision: str | None, where: str) -> ModelSource:
    """Read a model's architecture and tokenizer, without its weights.

    Args:
        path: folder or hub id.
        revision: hub revision, or None.
        where: the config key, for errors.

    Returns:
        The model without weights.

    Raises:
        FileNotFoundError: no such folder or hub id.
        ConfigError: the model is not supported.
    """
    try:
        model = read_language_model(path, revision=revision)
        check_rows(str(model.folder), model.info, model.decoder)
        return model
    except ValueError as error:
        raise ConfigError(f"{where} = {path}: {error}") from error


def choose_models(
    config: TrainConfig,
    mesh: Mesh,
    *,
    read: ModelReader = read_model,
    teach: TeacherReader = read_teacher,
    adapt: AdapterReader = read_adapter,
    memory: int | None = None,
) -> Models:
    """Find the folders and check everything that needs no weights.

    Args:
        config: of the run.
        mesh: the device mesh; a linear map is checked against its memory.
        read: reads a model without its weights.
        teach: reads a teacher without its weights.
        adapt: reads a LoRA value folder without its arrays.
        memory: bytes per device, of devices that are not attached; None: they are asked.

    Returns:
        The models.

    Raises:
        FileNotFoundError: no such folder or hub id.
        ConfigError: batch rows are longer than a model's context, a tokenizer has more ids than its
            weights have rows, a linear map does not fit, the value network has fewer layers than
            `value.depths`, or the devices do not support the form of attention.
        TokenizerMismatchError: a base and the value network have different vocabularies.
    """
    several = bool(config.bases)
    found = [
        read(base.path, base.revision, f"bases[{index}].path" if several else "base.path")
        for index, base in enumerate(config.all_bases)
    ]
    first = found[0]
    for model, base in zip(found, config.all_bases, strict=True):
        attention_of(config, model.arch, Layout(mesh, LAYOUTS[base.layout]))
    if config.method == "sft":
        check_context(config, _contexts(found))
        original = None
        if find_objective(config).needs_reference:
            original = FrozenBase(first, config.base, unknown_ids=())
        teacher = _teacher(config, [first], teach)
        return Models(first, first.arch, bases=(), teacher=teacher, original=original)
    trained, arch, lora, adapter = first, first.arch, None, None
    scheme = load_extension(
        config.value.connection, SCHEMES, ConnectionScheme, where="value.connection"
    )
    if not scheme.has_layers:
        arch = LinearMapConfig(first.info.vocab_size, config.value.rank)
        check_linear_map(arch, config.value.layout, mesh, memory)
    elif config.value.init == "base":
        arch = dataclasses.replace(first.arch, tie_word_embeddings=False)
    else:
        trained, lora, adapter = read_trained(config.value, scheme, read, adapt)
        arch = trained.arch
    if scheme.reads_base_hidden:
        arch = _with_base_width(arch, found)
    if config.value.depths > 1:
        check_depths(arch, config.value.depths)
        arch = dataclasses.replace(arch, head_depths=config.value.depths)
    check_context(config, _contexts([*found, trained]))
    attention_of(config, arch, Layout(mesh, LAYOUTS[config.value.layout]))
    bases = []
    for model, base in zip(found, config.all_bases, strict=True):
        unknown = ()
        if model is not trained:
            unknown = check_compatible(
                model.info, trained.info, base_name=model.path, value_name=trained.path
            ).ids
        bases.append(FrozenBase(model, base, unknown))
    return Models(
        trained=trained,
        arch=arch,
        bases=tuple(bases),
        scheme=scheme,
        teacher=_teacher(config, found, teach),
        lora=lora,
        adapter=adapter,
    )


def _teacher(
    config: TrainConfig, students: list[ModelSource], read: TeacherReader
) -> ComposedSources | None:
    if not config.distil.teacher:
        return None
    sources = read(config.distil, students)
    check_context(config, {one.label: one.context for one in (sources.base, *sources.values)})
    return sources


def _with_base_width(arch: Architecture, bases: list[ModelSource]) -> ArchConfig:
    """The architecture of a value network that reads the final hidden states of these bases."""
    assert isinstance(arch, ArchConfig)
    widths = {base.path: base.decoder.hidden_size for base in bases}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{path}: {width}" for path, width in widths.items())
        raise ConfigError(
            "value.connection: a value network that reads hidden states needs bases with the same "
            f"hidden_size, found {listed}"
        )
    return dataclasses.replace(arch, base_hidden_size=bases[0].decoder.hidden_size)


def attention_of(config: TrainConfig, arch: Architecture, layout: Layout) -> AttentionForm:
    """Choose how a network of the run computes attention.

    Raises:
        ConfigError: these devices do not support `model.attention`.
    """
    dtype, wanted = jnp.dtype(config.step.compute_dtype), config.model.attention
    try:
        return attention_on_mesh(arch, layout, dtype=dtype, wanted=wanted)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def place_model(
    arch: Architecture,
    *,
    layout: LayoutName,
    param_dtype: DTypeLike,
    scan_layers: bool,
    mesh: Mesh,
    form: KernelForm = AS_TRAINED,
) -> Placement:
    """Decide where a model's parameters live.

    Args:
        arch: its architecture.
        layout: which mesh axes split it.
        param_dtype: dtype of the parameters.
        scan_layers: whether layers are stacked; a linear map has none.
        mesh: the device mesh.
        form: how kernels are stored.

    Returns:
        Shapes and shardings.
    """
    rules = LAYOUTS[layout]
    rows = padded_vocab_rows(arch.vocab_size, mesh, rules)
    shapes = functools.partial(
        abstract_network, arch, param_dtype=param_dtype, vocab_rows=rows, form=form
    )
    units = {"heads": arch.num_attention_heads, "kv_heads": arch.num_key_value_heads}
    unstacked = parameter_shardings(shapes(), mesh, rules, units=units)
    if not scan_layers or isinstance(arch, LinearMapConfig):
        return Placement(shapes(), unstacked, unstacked, rows, False)
    stacked = shapes(scan_layers=True)
    shardings = parameter_shardings(stacked, mesh, rules, units=units)
    return Placement(stacked, shardings, unstacked, rows, True)


def place_base(config: TrainConfig, base: FrozenBase, mesh: Mesh) -> Placement:
    """Decide where a base's parameters live."""
    return place_model(
        base.model.arch,
        layout=base.config.layout,
        param_dtype=float_dtype(base.config),
        scan_layers=base_is_stacked(config),
        mesh=mesh,
        form=kernel_form(base.config),
    )


def base_is_stacked(config: TrainConfig) -> bool:
    """Whether the layers of a base are stacked.

    The engine that samples answers reads the same arrays, and decodes layer by layer.
    """
    return config.step.scan_layers and find_objective(config).sampling is None


def kernel_form(config: BaseConfig) -> KernelForm:
    """How a base's kernels are stored."""
    return KernelForm(int8=config.param_dtype == "int8")


def float_dtype(config: BaseConfig) -> DTypeLike:
    """The dtype of a base's parameters; with int8 kernels, of the other parameters."""
    return jnp.dtype("float32" if config.param_dtype == "int8" else config.param_dtype)


def head_only(arch: ArchConfig, place: Placement) -> Placement:
    """Reduce a placement to the head, which turns hidden states into logits."""
    name = "embed_tokens" if arch.tie_word_embeddings else "lm_head"
    parts = (place.shapes, place.shardings, place.unstacked_shardings)
    shapes, shardings, unstacked = ({name: part[name]} for part in parts)
    return Placement(shapes, shardings, unstacked, place.vocab_rows, scan_layers=False)


def load_base(base: ModelSource, config: BaseConfig, place: Placement) -> Params:
    """Load the frozen base's parameters onto the mesh, only those in the placement."""
    what = "the base" if "layers" in place.shardings else "the head of the base"
    logger.info("loading %s %s", what, base.path)
    return load_model_params(base, float_dtype(config), place, form=kernel_form(config))


def make_trained_params(
    config: TrainConfig, models: Models, place: Placement, key: Key[Array, ""]
) -> Params:
    """Make the float32 master weights of the trained model at step 0.

    Args:
        config: of the run.
        models: from `choose_models`.
        place: of the trained model.
        key: the run's PRNG key; random weights fold 0 into it.

    Returns:
        Its parameters, created sharded.
    """
    trained = models.trained
    if config.method == "sft" or config.value.init == "pretrained":
        logger.info("loading %s for training", trained.path)
        params = load_model_params(trained, jnp.dtype(jnp.float32), place)
        return params | _additions(models.arch, place)
    if config.value.init == "scratch":
        if isinstance(models.arch, LinearMapConfig):
            logger.info("a linear map on base logits, initialised to zero output")
        else:
            logger.info("random weights with the architecture of %s", trained.path)
        make = functools.partial(
            init_network,
            models.arch,
            vocab_rows=place.vocab_rows,
            scan_layers=place.scan_layers,
        )
        return jax.jit(make, out_shardings=place.shardings)(jax.random.fold_in(key, 0))
    logger.info("loading the base's own weights for training, with a zeroed head")
    params = load_model_params(trained, jnp.dtype(jnp.float32), place)
    zeros = functools.partial(jnp.zeros_like, place.shapes["lm_head"]["kernel"])
    head = jax.jit(zeros, out_shardings=place.shardings["lm_head"]["kernel"])()
    return params | {"lm_head": {"kernel": head}} | _additions(models.arch, place)


def _additions(arch: Architecture, place: Placement) -> Params:
    """What a value network adds to a published model's weights, zero at first."""
    shardings = {name: at for name, at in place.shardings.items() if name in ADDITIONS}
    if not isinstance(arch, ArchConfig) or not shardings:
        return {}
    return jax.jit(functools.partial(zero_additions, arch, jnp.float32), out_shardings=shardings)()


def load_model_params(
    model: ModelSource, param_dtype: DTypeLike, place: Placement, form: KernelForm = AS_TRAINED
) -> Params:
    """Load a model's parameters onto the mesh, only those in the placement."""
    # The files have no tied head, and nothing that only value networks have.
    absent = {*ADDITIONS} | ({"lm_head"} if model.arch.tie_word_embeddings else set())
    shardings = {name: at for name, at in place.unstacked_shardings.items() if name not in absent}
    params = load_params(
        model.local_folder,
        model.decoder,
        param_dtype=param_dtype,
        form=form,
        vocab_rows=place.vocab_rows,
        shardings=shardings,
        entries=tuple(shardings),
    )
    return _stack_layers(params, place.shardings["layers"]) if place.scan_layers else params


def _stack_layers(params: Params, shardings: Params) -> Params:
    """Stack the layers one parameter at a time, freeing the old arrays: peak memory is one more."""
    layers = [params["layers"][index] for index in sorted(params["layers"])]

    def stack(sharding: NamedSharding, *leaves: Array) -> Array:
        whole = jax.jit(lambda *each: jnp.stack(each), out_shardings=sharding)(*leaves)
        whole.block_until_ready()
        for leaf in leaves:
            leaf.delete()
        return whole

    return params | {"layers": jax.tree.map(stack, shardings, *layers)}


def _contexts(models: list[ModelSource]) -> dict[str, int]:
    return {model.path: model.arch.max_position_embeddings for model in models}
