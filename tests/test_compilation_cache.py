"""Where compiled programs are kept."""

import jax
import pytest

from ivl_jax.compilation_cache import default_folder, describe_compiling, use_compilation_cache


@pytest.fixture(autouse=True)
def as_it_was():
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_folder_is_taken_where_nothing_else_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    assert describe_compiling() == "compiling"
    use_compilation_cache("")
    folder = jax.config.jax_compilation_cache_dir
    assert folder.startswith(str(tmp_path / "ivl_jax" / "compiled"))
    assert describe_compiling() == f"compiling; programs are kept in {folder}"
    assert jax.config.jax_compilation_cache_max_size == 4 << 30
    use_compilation_cache("none")
    assert jax.config.jax_compilation_cache_dir is None


def test_what_jax_was_told_already_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "told")


def test_without_a_folder_to_write_to_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert default_folder() is None
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir is None
