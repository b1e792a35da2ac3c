"""Breaks files in ways that people, tools, disks and attackers break them, the same for a seed.

In: the sound content of a file and a kind. Out: altered contents, endless.
"""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

Kind = Literal["json", "lines", "text", "safetensors", "bytes"]

_DEEP = 3000
# What a value may be replaced with: other kinds, extremes, and texts that are half of something.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1e308, 2**31, 2**63, 10**19, 10**400),
    *(float("nan"), float("inf"), "", "x", "0", "é", "\x00", "\ud800", "a" * 5000, "../x", "/"),
    *("{{", "{", "module:attribute", [], [1], [[]], [None], ["x", {}], {}, {"a": 1}, {"": None}),
)
_KEYS = ("x", "", "é", "\ud800", "auto_map", "history", "weight", "role", "format_version")
_PIECES = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\n", b"\r\n", b"\n\n", b"\t"),
    *(b"{", b"}", b"]" * 3, b"[" * _DEEP, b'{"a":' * _DEEP, b'"', b"'''", b"\\", b",", b":", b"="),
    *(b"9" * 5000, b"1e999", b"NaN", b"inf", b"null", b"-", b"#", b"[[x]]", b"\\ud800", b"{{ x }}"),
    *(b"{% for i in range(10**9) %}{% endfor %}", b"{{ 'a' * 10**11 }}", b"{{ 1 / 0 }}", b"{%"),
)


def mutations(seeds: Sequence[bytes], kind: Kind, seed: str) -> Iterator[bytes]:
    """Alter sound contents.

    Args:
        seeds: Sound contents, at least one.
        kind: What they are: JSON, JSON lines, other text, a safetensors file, or only bytes.
        seed: Decides everything.

    Yields:
        Altered contents; some are sound by chance.
    """
    rng = random.Random(seed)
    by_kind: dict[Kind, Callable[[bytes, random.Random], bytes]] = {
        "json": _mutate_json,
        "lines": _mutate_lines,
        "text": _mutate_bytes,
        "safetensors": _mutate_safetensors,
        "bytes": _mutate_bytes,
    }
    while True:
        content = rng.choice(seeds)
        yield by_kind[kind](content, rng)


def _mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Alters the value in most cases, the text in some."""
    if rng.random() < 0.35:
        return _mutate_bytes(content, rng)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _altered_value(value, rng)
    # Half of a surrogate pair is written as the escape that it is in JSON.
    return json.dumps(value).encode()


def _mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """Alters one line of JSON or the whole; sometimes swaps, repeats or drops lines."""
    if rng.random() < 0.3:
        return _mutate_bytes(content, rng)
    lines = content.splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 1 if len(lines) > 1:
                del lines[at]
            case _:
                try:
                    lines[at] = _mutate_json(lines[at], rng)
                except (ValueError, RecursionError):  # altered before
                    lines[at] = _mutate_bytes(lines[at], rng)
    return b"\n".join(lines) + rng.choice((b"\n", b"\n", b"", b"\r\n"))


def _mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Alters the length of the header, the header, or any bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(4):
        case 0:
            lengths = (0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1, len(content))
            return struct.pack("<Q", rng.choice(lengths)) + header + data
        case 1:
            return _mutate_bytes(content, rng)
        case _:
            header = _mutate_json(header, rng)
            return struct.pack("<Q", len(header)) + header + data


def _mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, inserts, deletes, repeats and cuts."""
    altered = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, other = rng.randrange(len(altered) + 1), rng.randrange(len(altered) + 1)
        match rng.randrange(6):
            case 0 if altered:
                altered[at % len(altered)] ^= 1 << rng.randrange(8)
            case 1:
                del altered[at : at + rng.choice((1, 4, 100))]
            case 2 | 3:
                altered[at:at] = rng.choice(_PIECES)
            case 4:
                altered[at:at] = altered[min(at, other) : max(at, other)][:1000]
            case 5 if rng.random() < 0.5:
                del altered[at:]
    return bytes(altered)


def _altered_value(value: Any, rng: random.Random) -> Any:
    """One value of a JSON document replaced, removed or nested; in place but for a root."""
    places = _places(value)
    if not places:
        return copy.deepcopy(rng.choice(_VALUES))
    owner, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2 | 3:
            owner[key] = copy.deepcopy(rng.choice(_VALUES))
        case 4:
            del owner[key]
        case 5 if isinstance(owner, dict):
            owner[rng.choice(_KEYS)] = copy.deepcopy(rng.choice(_VALUES))
        case 6:
            owner[key] = [owner[key]] if rng.random() < 0.5 else {"a": owner[key]}
        case _:
            source, name = rng.choice(places)
            owner[key] = json.loads(json.dumps(source.get(name) if isinstance(source, dict) else 0))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside, at most the first 50 of a list."""
    found: list[tuple[Any, Any]] = []
    inside: Any = []
    if isinstance(value, dict):
        inside = list(value)
    elif isinstance(value, list):
        inside = range(min(len(value), 50))
    for key in inside:
        found.append((value, key))
        found += _places(value[key])
    return found
