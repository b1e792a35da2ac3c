"""Questions on docstrings, made by parsing."""

import pytest

from ivl_jax.experiments.family.corpus import SourceFile
from ivl_jax.experiments.family.docstrings import docstring_pairs, split_of_module
from ivl_jax.experiments.family.facts import Split

_SOURCE = '''
raise SystemExit("never imported")

class Box:
    """A box that
    holds things.

    More about it.
    """

    def put(self, thing, *more, loud=False, **rest):
        """Put a thing into the box."""

        def inner(x, /):
            """Only used inside of put."""

    @classmethod
    async def make(cls, *, size: int = 3):
        """Make a box of a size."""

    def short(self):
        """Tiny."""

def again(a):
    """Put a thing into the box."""

if True:
    def hidden():
        """Defined under a condition."""
'''


def _pairs() -> dict[str, str]:
    pairs = docstring_pairs([SourceFile("pack/age/__init__.py", _SOURCE)])
    return {pair.question: pair.answer for pair in pairs}


def test_the_first_paragraph_answers_on_one_line() -> None:
    assert _pairs()["What does `pack.age.Box` do?"] == "A box that holds things."


def test_signatures_are_shown_by_name_without_self_and_defaults() -> None:
    questions = list(_pairs())
    assert "What does `pack.age.Box.put(thing, *more, loud, **rest)` do?" in questions
    assert "What does `pack.age.Box.make(*, size)` do?" in questions
    assert "What does `pack.age.Box.put.inner(x)` do?" in questions
    assert "What does `pack.age.hidden()` do?" in questions


def test_a_copied_docstring_and_a_tiny_one_are_left_out() -> None:
    questions = " ".join(_pairs())
    assert "again" not in questions
    assert "short" not in questions


def _module_of(split: Split, name: str) -> SourceFile:
    """The module of that split with two docstrings: one that other modules have too."""
    module = next(f"m{n}" for n in range(1000) if split_of_module(f"m{n}") == split)
    copied = "Return what every one of them returns."
    text = f'def copied():\n    """{copied}"""\n\ndef own():\n    """Only in {name} module."""\n'
    return SourceFile(f"{module}.py", text)


def test_a_module_is_on_one_side_of_the_split_and_no_answer_on_two() -> None:
    splits: tuple[Split, ...] = ("test", "train", "validation")
    files = [_module_of(split, f"the {split}") for split in splits]
    pairs = docstring_pairs(files)
    found = {pair.answer: (pair.module, pair.split) for pair in pairs}
    modules = [file.path.removesuffix(".py") for file in files]
    assert len(pairs) == len(found) == 4, "the copies would be answers of two splits"
    assert found["Return what every one of them returns."] == (modules[0], "test")
    for module, split in zip(modules, splits, strict=True):
        assert found[f"Only in the {split} module."] == (module, split)


@pytest.mark.slow
def test_this_pythons_library_gives_thousands_of_pairs_on_every_side() -> None:
    splits = [pair.split for pair in docstring_pairs()]
    assert len(splits) > 3000
    assert min(splits.count(split) for split in ("train", "validation", "test")) > 50
