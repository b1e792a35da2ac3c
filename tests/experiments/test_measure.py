"""What the studies share: the vocabulary map between two models of the family."""

from pathlib import Path

from ivl_jax.assets import family_folder
from ivl_jax.experiments.measure import family_map
from ivl_jax.vocabulary.mapping import load_vocabulary_map
from ivl_jax.weights.language_model import load_language_model


def test_a_map_is_written_only_where_vocabularies_differ(tmp_path: Path) -> None:
    small, large, other = (
        load_language_model(str(family_folder(name))) for name in ("S", "L", "X")
    )
    path = tmp_path / "maps" / "map.safetensors"
    assert family_map(large, small, ["def add(a, b):"], path=path) is None
    assert not path.parent.exists()
    assert family_map(other, small, ["def add(a, b):"], path=path) == path
    _, metadata = load_vocabulary_map(path)
    assert (metadata.base_name, metadata.value_name) == ("X", "S")
