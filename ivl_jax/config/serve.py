"""The flags of ivl-serve: a composed model, an address, and the limits of what clients may ask.

In: the command line. Out: a frozen dataclass whose own checks have passed.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from ivl_jax.config.annotations import Inline, Repeatable
from ivl_jax.config.checks import ConfigError, require, require_numbers
from ivl_jax.config.model import ComposedModelConfig, RuntimeConfig, model_problems

SMALLEST_PREFILL_BLOCK = 64
"""Tokens of a block of a prompt, at least: what the caches of sliding windows take at once."""
MODEL_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
"""What requests can call a model, as a regular expression of Python and of JSON schemas."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve a base model and its value networks over HTTP, as OpenAI's API."""

    model: Inline[ComposedModelConfig] = field(default_factory=ComposedModelConfig)
    name: str = ""
    """The base's name in requests; empty: the last part of --base."""
    host: str = "127.0.0.1"
    """The address to listen on; the default is reachable from this machine only."""
    port: int = 8000
    """The port to listen on; 0: any free one, which the log names."""
    allowed_hosts: Repeatable[tuple[str, ...]] = ()
    """A name by which requests may call the server in their Host header (`*.NAME`: all below it;
    `*`: any), beside localhost and --host; repeat the flag for several. Without it, a server that
    only this machine can reach knows no other names, and one that others can reach takes any."""
    api_key: str = ""
    """What clients must send as `Authorization: Bearer …`; empty: `IVL_API_KEY` of the
    environment, or no key where that is not set either."""
    max_rows: int = 8
    """Choices decoded together, at most, rounded up to 2ᵏ or 3·2ᵏ; the others wait."""
    max_waiting: int = 64
    """Choices that wait for a row, at most; a request beyond that gets status 429."""
    max_request_tokens: int = 0
    """Tokens of a prompt and its answer together, at most; 0: the context."""
    max_cache_mib: int = 0
    """MiB of key-value caches on each device, at most, those that are moved or being read counted;
    0: what is free once the models are loaded, less a tenth of it or 256 MiB, whichever is more."""
    prefill_block: int = 512
    """Tokens of prompts that are read between two steps of running rows, at most; longer prompts
    are read in blocks of as many. 0: every prompt is read at once, and running rows wait for it."""
    values_dir: str = ""
    """A folder below which clients may load value networks while the server runs (`POST
    /v1/values`); empty: they may not."""
    max_values: int = 16
    """Value networks loaded at a time, at most; those of --value among them."""
    max_value_mib: int = 0
    """MiB that the parameters of all value networks may take on each device, where clients load
    more; 0: as much as is free there."""
    default_max_tokens: int = 256
    """Tokens of an answer where a request does not say."""
    max_choices: int = 8
    """Choices of one request (its prompts times `n`), at most."""
    max_messages: int = 256
    """Messages of one request, at most."""
    max_body_bytes: int = 1 << 20
    """Bytes of a request's body, at most."""
    queue_seconds: float = 60.0
    """A request whose first token takes longer than this gets status 503."""
    request_seconds: float = 600.0
    """A request that takes longer than this in total is ended, with status 503."""
    warm_up: bool = True
    """Compile the programs of short prompts under each model before listening, so that the first
    requests need not wait for them; `--no-warm-up` starts sooner."""
    drain_seconds: float = 30.0
    """How long running requests may take to finish after SIGTERM or Ctrl-C."""
    runtime: Inline[RuntimeConfig] = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self)
        require(0 <= self.port < 65536, f"--port must be in [0, 65535], got {self.port}")
        for name in self.allowed_hosts:
            require(
                re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9._-]+|[0-9A-Fa-f:]+", name) is not None,
                f"--allowed-hosts must be a name without scheme and port, such as chat.example.org "
                f"or *.example.org, or * for any, got {name!r}",
            )
        least = {
            "max_waiting": 0,
            "max_request_tokens": 0,
            "max_cache_mib": 0,
            "max_value_mib": 0,
            "max_values": 1,
            "drain_seconds": 0,
            "max_rows": 1,
            "default_max_tokens": 1,
            "max_choices": 1,
            "max_messages": 1,
            "max_body_bytes": 1024,
            "queue_seconds": 0.001,
            "request_seconds": 0.001,
        }
        problems = [
            f"--{name.replace('_', '-')} must be ≥ {smallest}, got {getattr(self, name)}"
            for name, smallest in least.items()
            if getattr(self, name) < smallest
        ]
        if 0 != self.prefill_block < SMALLEST_PREFILL_BLOCK:
            problems.append(
                f"--prefill-block must be 0 or ≥ {SMALLEST_PREFILL_BLOCK}, got {self.prefill_block}"
            )
        require(not problems, "; ".join(problems))

    @property
    def most_choices(self) -> int:
        """Choices of one request, at most: more could not run or wait all together."""
        return min(self.max_choices, self.max_rows + self.max_waiting)

    @property
    def base_name(self) -> str:
        """The base's name in requests."""
        return self.name or PurePath(self.model.base).name


@dataclass(frozen=True)
class NamedModel:
    """The models to compose, and what requests call them.

    Attributes:
        model: The flags, with plain paths.
        base: The base's name.
        values: The name of each value network, in order.
    """

    model: ComposedModelConfig
    base: str
    values: tuple[str, ...]


def check_serve_config(config: ServeConfig) -> NamedModel:
    """Check that the flags are complete and consistent.

    Args:
        config: the flags.

    Returns:
        The models and their names.

    Raises:
        ConfigError: flags are missing or conflict; lists all of them.

    Example:
        >>> model = ComposedModelConfig(base="models/L", value=("a=runs/a/value", "runs/b/value"))
        >>> named = check_serve_config(ServeConfig(model))
        >>> named.base, named.values, named.model.value
        ('L', ('a', 'b'), ('runs/a/value', 'runs/b/value'))
    """
    pairs = [_named(given) for given in config.model.values]
    names = [name for name, _ in pairs]
    maps, problems = _maps_by_value(config.model.map, names)
    model = dataclasses.replace(
        config.model, value=tuple(path for _, path in pairs) or ("none",), map=maps
    )
    problems = [*model_problems(model), *problems, *_name_problems(config.base_name, names)]
    problems += [
        f"--value {name}=: expected NAME=FOLDER" for name, path in pairs if name and not path
    ]
    if config.values_dir and len(names) > config.max_values:
        problems.append(
            f"--value names {len(names)} value networks, more than --max-values {config.max_values}"
        )
    if "none" in config.model.value and pairs:
        problems.append("--value none (the base alone) cannot be combined with another --value")
    if problems:
        raise ConfigError("serving cannot start:\n" + "\n".join(f"  - {line}" for line in problems))
    return NamedModel(model, config.base_name, tuple(names))


def is_model_name(name: str) -> bool:
    """Whether requests can call a model this.

    Example:
        >>> is_model_name("python-2"), is_model_name("a/b"), is_model_name("")
        (True, False, False)
    """
    return re.fullmatch(MODEL_NAME, name) is not None


def _named(given: str) -> tuple[str, str]:
    """A value's name and path: NAME=PATH, or a path that is named after its folder."""
    name, separator, path = given.partition("=")
    if separator and is_model_name(name):
        return name, path
    parts = [part for part in PurePath(given).parts if part != "value"]
    return (parts[-1] if parts else given), given


def _maps_by_value(given: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """One map per value, `none` where it needs none, and what is wrong with the flags."""
    files, problems = dict[str, str](), []
    for text in given:
        name, separator, file = text.partition("=")
        if not separator or not file:
            problems.append(f"--map {text}: expected NAME=FILE, with the name of a --value")
        elif name not in names:
            problems.append(f"--map {text}: no --value is named {name}; found {_listed(names)}")
        elif name in files:
            problems.append(f"--map {text}: {name} has a map already: {files[name]}")
        else:
            files[name] = file
    return tuple(files.get(name, "none") for name in names) if files else (), problems


def _name_problems(base: str, names: Sequence[str]) -> list[str]:
    """Names that requests could not tell apart, or that hold other characters."""
    problems = []
    for name in [base, *names] if base else names:
        if not is_model_name(name):
            flag = "--name NAME" if name == base else f"--value NAME={name}"
            problems.append(
                f"{name!r} cannot be a model's name (letters, digits, '.', '_' and '-'): name it "
                f"with {flag}"
            )
    twice = sorted({name for name in names if list(names).count(name) > 1 or name == base})
    if twice:
        problems.append(
            f"two models are named {' and '.join(twice)}: name them with --value NAME=FOLDER"
        )
    return problems


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
