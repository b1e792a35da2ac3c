"""Value networks are loaded and unloaded while the server answers.

In: what a request asks to load, or a name to unload. Out: a changed catalogue and a changed engine.
Files are read and checked in a thread of its own, one value network at a time; the engine's thread
only takes the finished arrays, between two steps.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax

from ivl_jax.config import ServeConfig
from ivl_jax.decoding.added_values import CheckedValue, ValueLoader, bytes_on_device
from ivl_jax.decoding.engine import Engine
from ivl_jax.devices import free_memory
from ivl_jax.serving.bodies import AskedValue
from ivl_jax.serving.catalogue import Catalogue, ServedValue
from ivl_jax.serving.engine_thread import EngineThread
from ivl_jax.serving.errors import ApiError, invalid
from ivl_jax.serving.front import Front
from ivl_jax.serving.value_paths import find_below, refuse_links_out
from ivl_jax.vocabulary.mapping import VocabularyMapError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class ValueDesk:
    """Loads and unloads; every method is called in the event loop.

    Args:
        config: of the server.
        catalogue: the models that requests may name.
        engine: the thread that decodes.
        front: reads with the base's tokenizer, one thread at a time.
        loader: reads value networks.
        root: the folder below which they must be, resolved; None: clients neither load nor unload.
    """

    def __init__(
        self,
        config: ServeConfig,
        catalogue: Catalogue,
        engine: EngineThread,
        front: Front,
        loader: ValueLoader,
        *,
        root: Path | None,
    ) -> None:
        self._config, self._catalogue, self._engine = config, catalogue, engine
        self._front, self._loader, self._root = front, loader, root
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="values")
        # What is being loaded; nothing else is until it is there.
        self._loading: str | None = None

    async def load(self, asked: AskedValue) -> ServedValue:
        """Load a value network.

        Args:
            asked: its name and files.

        Returns:
            What requests may use from now on.

        Raises:
            ApiError: 403, 404 for files that may not be read or that do not exist; 409 for a name
                that is taken, or while another one is being loaded; 400 where it does not fit the
                base; 507 where there is no room for it.
        """
        root = self._require_root()
        self._check_name(asked.name)
        self._loading = asked.name
        try:
            return await self._load(root, asked)
        finally:
            self._loading = None

    async def unload(self, name: str) -> None:
        """Unload a value network.

        Args:
            name: its name.

        Raises:
            ApiError: 403 where clients may load none; 404 where there is none of this name; 409
                while requests use it; 500 where the engine could not remove it, and it stays.
        """
        self._require_root()
        with self._catalogue.removing(name) as value:
            try:
                await self._engine.change(lambda engine: engine.remove_value(value.place))
            except ApiError:
                raise
            except Exception as error:
                logger.exception("the value network %s could not be unloaded", name)
                kind = type(error).__name__
                raise ApiError(
                    500, f"the value network {name} could not be unloaded ({kind}): it stays loaded"
                ) from error
        logger.info("unloaded the value network %s", name)

    def close(self) -> None:
        """End the thread that loads."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _require_root(self) -> Path:
        """The folder to load from; without one, clients neither load nor unload."""
        if self._root is None:
            raise ApiError(
                403,
                "this server was given no folder to load value networks from, so clients may "
                "neither load nor unload any: start it with --values-dir",
                code="loading_disabled",
            )
        return self._root

    def _check_name(self, name: str) -> None:
        if self._loading is not None:
            raise ApiError(
                409,
                f"the value network {self._loading} is being loaded: try again when it is there",
                code="loading",
                headers={"Retry-After": "1"},
            )
        catalogue, most = self._catalogue, self._config.max_values
        if name in catalogue.names or name in catalogue.loaded:
            raise ApiError(
                409,
                f"name: {name} is the name of a model already: unload it first (DELETE "
                "/v1/values/NAME), or choose another name",
                param="name",
                code="name_taken",
            )
        if len(catalogue.loaded) >= most:
            raise _no_room(f"{most} value networks are loaded, as many as --max-values allows")

    async def _load(self, root: Path, asked: AskedValue) -> ServedValue:
        start = time.perf_counter()

        def check() -> CheckedValue:
            folder = find_below(root, asked.folder, field="folder")
            if not folder.is_dir():
                raise invalid(f"folder: {asked.folder!r:.200} is not a folder", "folder")
            refuse_links_out(root, folder, field="folder")
            file = asked.map_file
            map_file = None if file is None else find_below(root, file, field="map")
            if map_file is not None and not map_file.is_file():
                raise invalid(f"map: {file!r:.200} is not a file", "map")
            return self._loader.check(folder, map_file, name=asked.name)

        checked = await self._in_worker(root, check)
        self._check_room(asked.name, self._loader.device_bytes(checked))
        own = await self._front.read(lambda: self._loader.own_vocabulary(checked))
        value = await self._in_worker(
            root, lambda: self._loader.load(checked, own, strength=asked.strength)
        )
        # Nothing else takes a place while this one is being loaded.
        place = self._catalogue.free_place()
        growth: list[int] = []

        def add(engine: Engine) -> None:
            growth.append(engine.cache_growth)
            engine.add_value(place, value)
            growth.append(engine.cache_growth)

        try:
            await self._engine.change(add)
        except ValueError as error:
            raise invalid(str(error), "folder") from error
        size = bytes_on_device(value.arrays.params)
        await self._check_caches(asked.name, place, *growth, taken=size)
        served = ServedValue(
            asked.name,
            place,
            checked.source,
            own,
            asked.strength,
            int(time.time()),
            size,
        )
        self._catalogue.add(served)
        seconds = time.perf_counter() - start
        logger.info("loaded the value network %s in %.1f s", asked.name, seconds)
        return served

    async def _in_worker(self, root: Path, work: Callable[[], _T]) -> _T:
        """Do some work in the thread that loads; its errors become answers."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        except FileNotFoundError as error:
            raise ApiError(404, _without(root, error), param=_field(error)) from error
        except (ValueError, OSError, ImportError) as error:
            raise invalid(_without(root, error), _field(error)) from error
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise _no_room("the device ran out of memory while it was being loaded") from error
            raise

    def _check_room(self, name: str, needed: int) -> None:
        """Refuse a value network that would leave no room for the caches."""
        most = self._config.max_value_mib << 20
        taken = sum(value.device_bytes for value in self._catalogue.loaded.values())
        if most and taken + needed > most:
            raise _no_room(
                f"{name} takes {_mib(needed)} MiB on each device, and the value networks that are "
                f"loaded take {_mib(taken)} of the {_mib(most)} MiB of --max-value-mib"
            )
        free, caches = free_memory(jax.local_devices()[0]), self._config.max_cache_mib << 20
        if free is not None and needed > free - caches:
            raise _no_room(
                f"{name} takes {_mib(needed)} MiB on each device, where {_mib(free)} MiB are free, "
                f"of which the caches may take {_mib(caches)} (--max-cache-mib)"
            )

    async def _check_caches(
        self, name: str, place: int, before: int, after: int, *, taken: int
    ) -> None:
        """Take a value network out again if it alone makes the caches larger than what is free."""
        limited = self._config.max_cache_mib > 0  # else the caches were to fit
        free = free_memory(jax.local_devices()[0])
        if free is None or after <= free:
            return
        if limited and before > free + taken:  # of which the start has warned
            logger.warning("%s", describe_growth(after, free))
            return
        await self._engine.change(lambda engine: engine.remove_value(place))
        raise _no_room(f"with {name}, {describe_growth(after, free)}")


def describe_growth(growth: int, free: int) -> str:
    """Say that caches may outgrow a device.

    Args:
        growth: bytes by which they may still grow on each device.
        free: bytes that are free there.
    """
    return (
        f"the caches may grow by {_mib(growth)} MiB on each device, where {_mib(free)} MiB are "
        "free: --max-cache-mib, --max-rows and --max-request-tokens limit them"
    )


def _no_room(why: str) -> ApiError:
    return ApiError(
        507,
        f"there is no room for another value network: {why}; unload one (DELETE /v1/values/NAME)",
        code="insufficient_memory",
    )


def _field(error: Exception) -> str:
    """The field of the body that names the file an error is about."""
    return "map" if isinstance(error, VocabularyMapError) else "folder"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _without(root: Path, error: Exception) -> str:
    """An error's message with paths as the client writes them."""
    return str(error).replace(f"{root}{'/'}", "").removeprefix("--value ")
