"""Parses command lines into config dataclasses.

In: a dataclass whose fields may carry the marks of `ivl_jax.config.annotations`. Out: an instance.
"""

import dataclasses
import functools
import itertools
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ivl_jax.config.annotations import INLINE, NO_FLAG, REPEATABLE, is_marked
from ivl_jax.config.checks import ConfigError, require_numbers
from ivl_jax.config.files import EARLIER_BOOLEANS

ConfigT = TypeVar("ConfigT")


def parse_flags(
    config_type: type[ConfigT],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: ConfigT | None = None,
) -> ConfigT:
    """Parse a command line; after `--help` or an error, prints a message and exits.

    Args:
        config_type: the dataclass.
        arguments: without the program's name.
        prog: the program's name.
        description: the first paragraph of the help; None: the dataclass's docstring.
        default: the values that flags override; None: the dataclass's defaults.

    Returns:
        The instance.

    Raises:
        SystemExit: after `--help`, or if the flags cannot be parsed (status 2).
        ConfigError: one of the dataclass's own checks failed, or a flag for a list of values occurs
            twice, of which only the last would count.
    """
    arguments = _in_todays_words(arguments)
    given = Counter(one.split("=")[0].replace("_", "-") for one in arguments)
    for flag in _list_flags(config_type):
        if given[flag] > 1:
            raise ConfigError(
                f"{flag} is given {given[flag]} times; give it once, with all values: {flag} A B"
            )
    return tyro.cli(
        config_type,
        prog=prog,
        description=description,
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        registry=_registry(),
    )


def _in_todays_words(arguments: Sequence[str]) -> list[str]:
    """Give flags that were once booleans, `--step.remat` and `--step.no-remat`, their words."""
    yes = {f"--{key}": words[True] for key, words in EARLIER_BOOLEANS.items()}
    no = {flag.replace(".", ".no-"): flag for flag in yes}
    found: list[str] = []
    for one, following in itertools.zip_longest(arguments, arguments[1:]):
        if one in no:
            flag = no[one]
            found += [flag, EARLIER_BOOLEANS[flag.removeprefix("--")][False]]
        elif one in yes and (following is None or following.startswith("--")):
            found += [one, yes[one]]
        else:
            found.append(one)
    return found


def _list_flags(config_type: type, prefix: str = "--") -> Iterator[str]:
    """Flags that take several values at once, `--data.train A B`."""
    for name, hint in typing.get_type_hints(config_type, include_extras=True).items():
        kind = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            inline = is_marked(hint, INLINE)
            yield from _list_flags(typing.cast(type, kind), prefix if inline else f"{flag}.")
        elif typing.get_origin(kind) is tuple and hint is kind:
            yield flag


def parse_subcommand(
    commands: Mapping[str, Callable[..., Any]],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
) -> Any:
    """Parse a command line that begins with the name of a command.

    Args:
        commands: name → dataclass, or function whose arguments are flags.
        arguments: without the program's name.
        prog: the program's name.
        description: the first paragraph of the help.

    Returns:
        The dataclass's instance, or what the function returned.

    Raises:
        SystemExit: as `parse_flags`.
        ConfigError: as `parse_flags`.
    """
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog=prog,
        description=description,
        args=arguments,
        registry=_registry(),
    )


def _registry() -> ConstructorRegistry:
    """The tyro rules for our marks on dataclass fields."""
    registry = ConstructorRegistry()
    inner: list[type] = []  # dataclasses whose fields tyro is listing for us

    @registry.struct_rule
    def read_marks(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in inner:
            return None
        inner.append(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            inner.pop()
        return _read_marks(spec) if isinstance(spec, StructConstructorSpec) else None

    return registry


def _read_marks(spec: StructConstructorSpec) -> StructConstructorSpec:
    """Put the fields of inline dataclasses among the others, and mark repeatable flags."""
    inline: dict[str, StructConstructorSpec] = {}
    fields: list[StructFieldSpec] = []
    for field in spec.fields:
        kind: Any = field.type
        if is_marked(kind, NO_FLAG):
            continue
        if is_marked(kind, INLINE):
            info = StructTypeInfo.make(kind.__origin__, field.default, in_union_context=False)
            found = ConstructorRegistry.get_struct_spec(info)
            assert isinstance(found, StructConstructorSpec), f"{field.name} is not a dataclass"
            inline[field.name] = found
            fields += found.fields
            continue
        if is_marked(kind, REPEATABLE):
            kind = tyro.conf.UseAppendAction[kind]
        fields.append(dataclasses.replace(field, type=kind, helptext=_as_paragraph(field.helptext)))

    @functools.wraps(spec.instantiate)  # tyro shows its docstring above the flags
    def instantiate(**values: Any) -> Any:
        for name, one in inline.items():
            values[name] = one.instantiate(**{own.name: values.pop(own.name) for own in one.fields})
        made = spec.instantiate(**values)
        require_numbers(made)
        return made

    return StructConstructorSpec(instantiate=instantiate, fields=tuple(fields))


def _as_paragraph(helptext: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """A help text without the source's line breaks, joined only when it is shown."""

    def joined() -> str | None:
        text = helptext() if callable(helptext) else helptext
        return text and " ".join(text.split())

    return joined
