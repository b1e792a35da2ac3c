"""The public names exist, are the objects they claim to be, and cost nothing until used."""

import subprocess
import sys

import pytest

import ivl_jax


@pytest.mark.parametrize("name", ivl_jax.__all__)
def test_every_public_name_is_documented_and_loads(name: str) -> None:
    public = getattr(ivl_jax, name)
    assert public.__doc__
    assert name in dir(ivl_jax)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        ivl_jax.load_modle  # noqa: B018


def test_importing_the_package_loads_no_jax() -> None:
    code = "import sys, ivl_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
