"""Whatever a TOML file holds, it is read or the error names file and place."""

import sys
from pathlib import Path

import pytest

from ivl_jax.text_files import MalformedFileError
from ivl_jax.toml_files import read_toml

HUGE = "9" * (sys.get_int_max_str_digits() + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = = 2\n", "line 2, column 5: not TOML: Invalid value"),
        (b"a = 1\na = 2\n", "line 2, column 6: not TOML: Cannot overwrite a value"),
        (b"a = [1,", "not TOML: "),
        (b"a = 1\nname = 'caf\xe9'\n", "line 2: byte 17: not UTF-8 (found 0xe9)"),
        ("a = 1".encode("utf-16"), "line 1: byte 0: not UTF-8 (it begins as UTF-16 does)"),
        (f"a = 1\nbig = {HUGE}\n".encode(), "line 2: big: an integer of more than 4300 digits"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "not TOML: nested too deeply"),
    ],
)
def test_every_malformed_file_is_named_with_the_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(MalformedFileError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_what_is_toml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b'\xef\xbb\xbfa = 1\r\n[b]\r\nc = "\xc3\xa9"\r\n')
    assert read_toml(path) == {"a": 1, "b": {"c": "é"}}
    with pytest.raises(FileNotFoundError):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(MalformedFileError, match="cannot be read"):
        read_toml(tmp_path)
