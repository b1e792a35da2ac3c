"""No path from a request leads out of the folder that the server was given."""

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ivl_jax.serving.errors import ApiError
from ivl_jax.serving.value_paths import find_below, refuse_links_out


@pytest.fixture
def root(tmp_path):
    """A folder with a value, links that stay inside and links that lead out; a secret beside it."""
    root = tmp_path / "values"
    (root / "a" / "value").mkdir(parents=True)
    (root / "a" / "value" / "ivl.json").write_text("{}")
    (root / "inside").symlink_to(root / "a")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "ivl.json").write_text("{}")
    (root / "outside").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "values-too").mkdir()
    return root.resolve()


@pytest.mark.parametrize("given", ["a/value", "./a/value", "a/../a/value", "inside/value"])
def test_a_path_below_the_folder_is_found_with_its_links_followed(root, given):
    assert find_below(root, given, field="folder") == root / "a" / "value"


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("../secret", 403),
        ("a/../../secret", 403),
        ("../values-too", 403),
        ("/etc/passwd", 403),
        ("~", 404),
        (".", 403),
        ("outside", 403),
        ("outside/ivl.json", 403),
        ("absent", 404),
        ("a\0b", 400),
        ("a/" + "x" * 5000, 400),
        ("\ud800", 400),
    ],
)
def test_other_paths_are_refused(root, given, status):
    with pytest.raises(ApiError) as refused:
        find_below(root, given, field="folder")
    assert refused.value.status == status
    assert str(root) not in refused.value.message


def test_a_link_out_behind_a_link_that_stays_inside_is_refused(root, tmp_path):
    (root / "b").mkdir()
    (root / "a" / "value" / "params").symlink_to(root / "b")
    (root / "b" / "back").symlink_to(root / "a")
    refuse_links_out(root, root / "a" / "value", field="folder")
    (root / "b" / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(ApiError) as refused:
        refuse_links_out(root, root / "a" / "value", field="folder")
    assert refused.value.status == 403


def test_a_loop_of_links_is_refused(root):
    with pytest.raises(ApiError) as refused:
        find_below(root, "loop", field="folder")
    assert refused.value.status in (400, 404)


def test_a_folder_with_a_link_that_leads_out_is_refused(root, tmp_path):
    folder = root / "a" / "value"
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").symlink_to(folder / "ivl.json")
    refuse_links_out(root, folder, field="folder")
    (folder / "tokenizer" / "more.json").symlink_to(tmp_path / "secret" / "ivl.json")
    with pytest.raises(ApiError, match=r"more\.json' is not below --values-dir") as refused:
        refuse_links_out(root, folder, field="folder")
    assert refused.value.status == 403
