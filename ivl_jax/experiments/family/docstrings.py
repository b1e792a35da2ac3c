"""Demonstrations from the docstrings of this machine's Python: what does a function do?

In: source files of the standard library, parsed, never imported. Out: question-answer pairs whose
answer is the first paragraph of a docstring, split by module.
"""

import ast
import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ivl_jax.experiments.family.corpus import SourceFile, standard_library_files
from ivl_jax.experiments.family.facts import Split

# A longer question or answer, in characters, would not fit into the family's context.
_MOST_CHARACTERS = 600
_LEAST_CHARACTERS = 12


class DocstringPair(NamedTuple):
    """A question about one documented name, its answer, and its split."""

    question: str
    answer: str
    module: str
    split: Split


def split_of_module(module: str) -> Split:
    """The split of a module's whole file: about 80, 5 and 15 %."""
    share = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) % 100
    if share < 80:
        return "train"
    return "validation" if share < 85 else "test"


def docstring_pairs(files: Iterable[SourceFile] | None = None) -> list[DocstringPair]:
    """Every documented function, method and class as a question and its answer.

    Args:
        files: Source files; None: those of the running Python's standard library.

    Returns:
        Pairs in file order, without repeated answers (inherited docstrings are copied all over the
        library, and copies in two splits would leak).
    """
    pairs = []
    seen: set[str] = set()
    for file in standard_library_files() if files is None else files:
        module = _module_name(file.path)
        split = split_of_module(module)
        for name, docstring in _documented(ast.parse(file.text), module):
            answer = first_paragraph(docstring)
            question = f"What does `{name}` do?"
            too_long = len(question) + len(answer) > _MOST_CHARACTERS
            if len(answer) < _LEAST_CHARACTERS or too_long or answer in seen:
                continue
            seen.add(answer)
            pairs.append(DocstringPair(question, answer, module, split))
    return pairs


def first_paragraph(docstring: str) -> str:
    """The text up to the first empty line, on one line.

    >>> first_paragraph('''Join two
    ...     or more paths.
    ...
    ...     Details.''')
    'Join two or more paths.'
    """
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    return " ".join(paragraph.split())


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(qualified name with its signature, docstring) of everything documented below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            name, shown = f"{prefix}.{child.name}", f"{prefix}.{child.name}"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name, shown = f"{prefix}.{child.name}", f"{prefix}.{child.name}({_arguments(child)})"
        else:
            yield from _documented(child, prefix)
            continue
        if docstring := ast.get_docstring(child, clean=False):
            yield shown, docstring
        yield from _documented(child, name)


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The arguments by name, without self, defaults and annotations: `a, *p`."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    if given.vararg is not None:
        names.append(f"*{given.vararg.arg}")
    elif given.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in given.kwonlyargs]
    if given.kwarg is not None:
        names.append(f"**{given.kwarg.arg}")
    return ", ".join(names)
