"""The documentation site builds without a warning, is complete, and asks no other host."""

import dataclasses
import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivl_jax
from ivl_jax.config import InferConfig, ServeConfig, TrainConfig, config_to_mapping

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")

_LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\s\">]+)|<link\b([^>]*)>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def _read(page: Path) -> str:
    return html.unescape(page.read_text(encoding="utf-8"))


def _loads(page: str) -> Iterator[str]:
    """Addresses that a browser reads by itself when it opens a page."""
    for source, link in _LOADED.findall(page):
        address = source or re.search(r"href=\"?([^\s\">]*)", link)[1]  # type: ignore[index]
        if 'rel="canonical"' not in link:
            yield address


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = _read(page)
        assert 'http-equiv="Content-Security-Policy"' in text, page
        addresses = list(_loads(text))
        assert addresses
        outside = [one for one in addresses if re.match(r"(https?:)?//", one)]
        assert not outside, f"{page}: {outside}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", _read(sheet)), sheet


def test_config_reference_has_every_field(site: Path) -> None:
    page = _read(site / "reference" / "config" / "index.html")
    for name, value in config_to_mapping(TrainConfig()).items():
        assert f"[{name}]" in page if isinstance(value, dict) else f"<code>{name}</code>" in page
        for field in value if isinstance(value, dict) else ():
            assert f"<code>{field}</code>" in page, f"{name}.{field}"
    for config in (InferConfig, ServeConfig):
        for field in dataclasses.fields(config):
            if isinstance(field.default, str | int | float):
                assert f"<code>--{field.name.replace('_', '-')}</code>" in page


def test_fields_are_explained(site: Path) -> None:
    page = _read(site / "reference" / "config" / "index.html")
    assert "Rows of the global batch, over all devices and micro-batches" in page
    assert "<td></td>" not in page


def test_python_api_has_every_public_name(site: Path) -> None:
    page = _read(site / "reference" / "api" / "index.html")
    described = set(re.findall(r'id="ivl_jax\.(\w+)"', page))
    assert set(ivl_jax.__all__) - {"TrainConfig"} <= described
