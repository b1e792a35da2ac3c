"""What a run trains: a whole network, a new adapter, or the adapter of a LoRA value folder.

In: the config's `value` table. Out: the sources, read and checked without their weights.
"""

from collections.abc import Callable
from typing import NamedTuple

from ivl_jax.checkpoint.value_arrays import lora_of
from ivl_jax.checkpoint.value_metadata import METADATA_NAME
from ivl_jax.composed.sources import ModelSource, read_value
from ivl_jax.composition import ConnectionScheme
from ivl_jax.config import ConfigError, ValueConfig
from ivl_jax.model.projection import Lora
from ivl_jax.paths import usable_path

ModelReader = Callable[[str, str | None, str], ModelSource]
"""(path or hub id, revision, config key for errors) → a model without weights."""
AdapterReader = Callable[[ValueConfig, ConnectionScheme], ModelSource]
"""(config whose path is a value folder, its connection scheme) → the folder without its arrays."""


class TrainedSource(NamedTuple):
    """A network before its weights."""

    model: ModelSource  # the network's initial weights; frozen if an adapter is trained
    lora: Lora | None  # the adapter; None: all parameters are trained
    adapter: ModelSource | None  # the value folder that has the adapter's initial values


def read_adapter(config: ValueConfig, scheme: ConnectionScheme) -> ModelSource:
    """Read everything but the arrays of a value folder that is trained further.

    Args:
        config: of the value network, whose `path` is a value folder.
        scheme: its connection scheme.

    Returns:
        The source.

    Raises:
        FileNotFoundError: an adapter's model cannot be found.
        ConfigError: the folder is damaged, or the model has other weights than in training.
    """
    models = (config.lora.model,) if config.lora.model else ()
    try:
        return read_value(config.path, models=models, schemes={config.connection: scheme})
    except ValueError as error:
        raise ConfigError(f"value.path = {config.path}: {error}") from error


def read_trained(
    config: ValueConfig,
    scheme: ConnectionScheme,
    read: ModelReader,
    adapter_reader: AdapterReader = read_adapter,
) -> TrainedSource:
    """Read everything but the weights of what is trained.

    Args:
        config: of the value network, whose `path` is needed.
        scheme: its connection scheme.
        read: reads a model without its weights.
        adapter_reader: reads a value folder without its arrays.

    Returns:
        The sources.

    Raises:
        FileNotFoundError: no such folder or hub id.
        ConfigError: `path` is a value folder that cannot be trained further, or not with these
            settings.
    """
    options, lora = config.lora, None
    if options.rank:
        lora = Lora(options.rank, options.alpha, options.targets)
    if not (usable_path(config.path) / METADATA_NAME).exists():
        if options.model:
            raise ConfigError(
                f'value.lora.model = "{options.model}" needs a LoRA value folder as '
                f"value.path, which {config.path} is not: remove it"
            )
        return TrainedSource(read(config.path, config.revision, "value.path"), lora, None)
    adapter = adapter_reader(config, scheme)
    assert adapter.metadata is not None
    found = lora_of(adapter.metadata)
    if found is None or adapter.adapted is None:
        raise ConfigError(
            f"value.path = {config.path} is a value folder of a whole network: write it as a model "
            f"first (python -m ivl_jax.checkpoint export-hf {config.path} OUT), then set "
            "value.path = OUT"
        )
    if found != lora:
        raise ConfigError(
            f"value.path = {config.path} holds an adapter, which is trained further as it is: "
            f"expected value.lora.rank = {found.rank}, value.lora.alpha = {found.alpha} and "
            f'value.lora.targets = "{found.targets}", got {options.rank}, {options.alpha} and '
            f'"{options.targets}"'
        )
    if adapter.metadata.connection != config.connection:
        raise ConfigError(
            f'value.path = {config.path} was trained with value.connection = "'
            f'{adapter.metadata.connection}", got "{config.connection}": set the former'
        )
    if adapter.arch.head_depths != config.depths:
        raise ConfigError(
            f"value.path = {config.path} was trained with value.depths = "
            f"{adapter.arch.head_depths}, got {config.depths}: set the former"
        )
    model = read(adapter.adapted.path, adapter.adapted.revision, "value.lora.model")
    return TrainedSource(model, found, adapter)
