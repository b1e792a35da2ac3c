"""What ivl-serve does once its flags are read: check, load, listen, drain.

In: a `ServeConfig`. Out: a running server. The port is taken and the models are checked against
each other before any weight is read.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import uvicorn
from starlette.applications import Starlette

from ivl_jax.command_line.guard import ends_at_once
from ivl_jax.compilation_cache import describe_compiling, use_compilation_cache
from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.config import ConfigError, NamedModel, ServeConfig, check_serve_config
from ivl_jax.decoding.added_values import ValueLoader, bytes_on_device
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.loading import decoding_mesh, load_composed, read_sources
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompts import make_prompt_reader
from ivl_jax.devices import default_cache_bytes, free_memory
from ivl_jax.processes import require_one_process
from ivl_jax.serving.answers import TokenTexts
from ivl_jax.serving.app import Service, make_app
from ivl_jax.serving.bounded_http import BoundedHttp
from ivl_jax.serving.catalogue import Catalogue, ServedValue
from ivl_jax.serving.engine_thread import EngineThread
from ivl_jax.serving.front import Front
from ivl_jax.serving.metrics import Metrics
from ivl_jax.serving.value_desk import ValueDesk, describe_growth
from ivl_jax.serving.warm_up import warm_up

logger = logging.getLogger(__name__)

_API_KEY = "IVL_API_KEY"
_BACKLOG = 256
# Open connections per request that runs or waits, at most: browsers keep idle ones.
_CONNECTIONS = 8


@dataclass(frozen=True)
class Prepared:
    """A server that is ready to run.

    Attributes:
        config: The flags.
        app: The application.
        service: What its paths do.
        listening: The socket, which is bound.
    """

    config: ServeConfig
    app: Starlette
    service: Service
    listening: socket.socket


def prepare(config: ServeConfig, *, framed_by: Sequence[str] = ()) -> Prepared:
    """Check flags and files, take the port, then load the models.

    Args:
        config: the flags.
        framed_by: origins whose pages may show the server's page in a frame.

    Raises:
        ConfigError: flags that do not fit, or a port that is taken.
        FileNotFoundError: no such base model or value folder.
        ValueError: models that do not fit each other, or weights.
    """
    named = check_serve_config(config)
    require_one_process("a server")
    api_key = config.api_key or os.environ.get(_API_KEY, "")
    listening = take_port(config.host, config.port)
    try:
        use_compilation_cache(config.runtime.compilation_cache)
        flags = named.model
        sources = read_sources(flags)
        mesh = decoding_mesh(flags.mesh, sources.base.arch)
        _ = make_prompt_reader(sources).chat_format  # a template that cannot be used
        root = values_root(config)
        loader = ValueLoader(sources, flags, mesh=mesh)
        model = load_composed(sources, flags, mesh=mesh)
        catalogue = make_catalogue(config, named, sources, model)
        metrics = Metrics()
        # Each request brings the stop ids and the context of the networks that it uses.
        free = _free_per_device()
        limits = engine_limits(config, free=free)
        decoder = model.engine(limits, stop_ids=(), context=catalogue.context)
        if free is not None and decoder.cache_growth > free:
            growth = describe_growth(decoder.cache_growth, free)
            logger.warning("%s; requests for which there is no room will fail", growth)
        elif not config.max_cache_mib and limits.max_cache_bytes is not None:
            logger.info("caches take at most %d MiB on each device", limits.max_cache_bytes >> 20)
        if config.warm_up:
            logger.info("warm-up: %s", describe_compiling())
            rows, new_tokens = config.max_rows, config.default_max_tokens
            warm_up(decoder, catalogue, rows=rows, new_tokens=new_tokens)
        engine = EngineThread(decoder, metrics)
        texts = TokenTexts(model.token_bytes, dict(sources.base.info.special_tokens))
        front = Front(config, engine, metrics)
        values = ValueDesk(config, catalogue, engine, front, loader, root=root)
        service = Service(config, catalogue, engine, metrics, front, values, texts)
        app = make_app(service, api_key=api_key, framed_by=framed_by)
        return Prepared(config, app, service, listening)
    except BaseException:
        listening.close()
        raise


def values_root(config: ServeConfig) -> Path | None:
    """The folder below which clients may load value networks, all links followed.

    Args:
        config: the flags.

    Returns:
        The folder; None: clients may load none.

    Raises:
        ConfigError: there is no such folder.
    """
    if not config.values_dir:
        return None
    root = Path(config.values_dir).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError(
            f"--values-dir {config.values_dir} is not a folder: name the folder below which "
            "clients may load value networks"
        )
    return root


def make_catalogue(
    config: ServeConfig, named: NamedModel, sources: ComposedSources, model: ComposedModel
) -> Catalogue:
    """List the models that the server begins with.

    Args:
        config: the flags.
        named: the names.
        sources: the models before their weights.
        model: the composed model; the catalogue holds none of its arrays.

    Returns:
        The catalogue; the places of its value networks are those of the model.
    """
    started = int(time.time())
    longest = config.max_request_tokens
    catalogue = Catalogue(sources, base=named.base, started=started, longest=longest)
    for place, name in enumerate(named.values):
        catalogue.add(
            ServedValue(
                name,
                place,
                sources.values[place],
                model.own_vocabularies[place],
                model.strengths[place],
                started,
                bytes_on_device(model.params.values[place].params),
            )
        )
    return catalogue


def _free_per_device() -> int | None:
    """Bytes that are free on each device; virtual CPU devices share the machine's."""
    device, *others = jax.local_devices()
    free = free_memory(device)
    if free is None or device.platform != "cpu":
        return free
    return free // (1 + len(others))


def engine_limits(config: ServeConfig, *, free: int | None) -> EngineLimits:
    """The engine's limits under these flags.

    Args:
        config: the flags.
        free: bytes that are free on each device, the models loaded; None: unknown, so that caches
            have no limit but that of the flags.
    """
    default = None if free is None else default_cache_bytes(free)
    return EngineLimits(
        max_rows=config.max_rows,
        max_capacity=config.max_request_tokens or None,
        max_cache_bytes=config.max_cache_mib << 20 or default,
        prefill_block=config.prefill_block or None,
    )


def take_port(host: str, port: int) -> socket.socket:
    """Take a port, without listening yet: until models are loaded, clients are refused at once.

    Args:
        host: the address.
        port: its port; 0: any free one.

    Returns:
        A socket that has the port.

    Raises:
        ConfigError: it is taken, or cannot be used.
    """
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise _taken(host, port) from error
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from error
    return listening


def _taken(host: str, port: int) -> ConfigError:
    return ConfigError(
        f"--port {port} of {host} is taken by another program: stop it, or name another port (0: "
        "any free one)"
    )


def serve(prepared: Prepared) -> None:
    """Answer requests until SIGTERM or Ctrl-C; running ones may then finish.

    Args:
        prepared: of `prepare`.

    Raises:
        ConfigError: another program has begun to listen on the port while models were loaded.
    """
    host, port = prepared.listening.getsockname()[:2]
    try:
        prepared.listening.listen(_BACKLOG)
    except OSError as error:
        raise _taken(host, port) from error
    address = f"[{host}]" if ":" in host else host
    logger.info(describe_compiling())
    logger.info("listening on http://%s:%d", address, port)
    try:
        make_server(prepared).run(sockets=[prepared.listening])
    finally:
        # What a thread still does, such as compiling or reading a value network, is for nobody.
        ends_at_once.set()


class _Server(uvicorn.Server):
    """Says what it waits for when it is told to stop."""

    def __init__(self, config: uvicorn.Config, front: Front, drain_seconds: float) -> None:
        super().__init__(config)
        self._front, self._drain_seconds = front, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if running := self._front.in_flight:
            logger.info(
                "stopping; choices that still run or wait: %d; they have %g s (--drain-seconds)",
                running,
                self._drain_seconds,
            )
        await super().shutdown(sockets)


def make_server(prepared: Prepared) -> uvicorn.Server:
    """Make what answers on the socket.

    Args:
        prepared: of `prepare`.
    """
    flags = prepared.config
    config = uvicorn.Config(
        prepared.app,
        http=BoundedHttp,
        # A body is held from its first byte, before its request counts as one that waits.
        limit_concurrency=_CONNECTIONS * (flags.max_rows + flags.max_waiting) + _CONNECTIONS,
        backlog=_BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(flags.drain_seconds)),
    )
    return _Server(config, prepared.service.front, flags.drain_seconds)
