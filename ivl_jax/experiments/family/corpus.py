"""The family's pre-training text: this Python's standard library and statements of invented facts.

Only well-documented files of the library: at least a tenth of their text is docstrings. In: a
tokenizer, a seed, an epoch. Out: fixed-length windows of token ids, a pure function of the three;
and the files excluded from all epochs, for held-out figures.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ivl_jax.experiments.family.facts import Fact, build_facts, statement_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:
    PreTrainedTokenizerFast = Any  # transformers takes seconds to import

# Tests, vendored packages, mere tables (encodings 1.4 MB, pydoc's topics 0.8 MB), and programs and
# deprecated packages (idlelib, distutils, … 2 MB): too much for a small model.
_SKIPPED = (
    "test tests idle_test site-packages dist-packages __pycache__ _bundled encodings pydoc_data "
    "msilib __phello__ idlelib distutils lib2to3 turtledemo tkinter"
)
_SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
# Keeps 5,380 of 6,127 docstrings in 5.8 of 7.8 MB (Python 3.11).
_LEAST_DOCSTRING_SHARE = 0.1
# One file in 40 is held out.
_HELD_OUT_ONE_IN = 40


class SourceFile(NamedTuple):
    """A file of the standard library."""

    path: str  # relative to the library's folder, with forward slashes
    text: str


class Corpus(NamedTuple):
    """The pre-training text."""

    sources: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    facts: tuple[Fact, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of every path, text and fact."""
        digest = hashlib.sha256()
        for part in (*self.sources, *self.held_out):
            digest.update(f"{part.path}\0{part.text}\0".encode())
        for fact in self.facts:
            digest.update(f"{fact.statement()}\0".encode())
        return digest.hexdigest()


def standard_library_files(root: Path | None = None) -> list[SourceFile]:
    """The standard library's well-explained source files, in a fixed order.

    Args:
        root: The library's folder; None: that of the running Python.

    Returns:
        Files sorted by path whose share of docstrings is at least `_LEAST_DOCSTRING_SHARE`; files
        that are not UTF-8 or do not parse are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            share = docstring_share(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if share >= _LEAST_DOCSTRING_SHARE:
            files.append(SourceFile(relative.as_posix(), text))
    return files


def docstring_share(text: str) -> float:
    r"""The share of a source file's characters that are docstrings, in [0, 1].

    >>> docstring_share("'One'\n")
    0.5
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        ast.get_docstring(node, clean=False) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
    ]
    return sum(map(len, docstrings)) / max(len(text), 1)


def is_held_out(path: str) -> bool:
    """Whether the file at this path, relative to the library, is excluded from pre-training."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % _HELD_OUT_ONE_IN == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """The text of this machine's Python and the facts, with separate held-out files."""
    files = standard_library_files(root)
    return Corpus(
        sources=tuple(file for file in files if not is_held_out(file.path)),
        held_out=tuple(file for file in files if is_held_out(file.path)),
        facts=tuple(build_facts()),
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text as uint16 ids with the end-of-text id in front (the eos of the document before)."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray([end, *document.ids], np.uint16) for document in encoded]


class Windows:
    """Windows of `length` + 1 ids (inputs and shifted targets), reshuffled every epoch."""

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, length: int, seed: int
    ) -> None:
        self.length = length
        self._seed = seed
        self._tokenizer = tokenizer
        self._facts = list(corpus.facts)
        self._sources = encode_documents(tokenizer, [file.text for file in corpus.sources])
        self.source_tokens = sum(map(len, self._sources))
        self._epoch: tuple[int, np.ndarray] | None = None
        statements = self._statements(0)
        self.statement_tokens = sum(map(len, statements))
        # Other epochs' statements differ in length by a fraction of a percent.
        total = (self.source_tokens + self.statement_tokens) * 99 // 100
        self.count = (total - length) // (length + 1)

    def _statements(self, epoch: int) -> list[np.ndarray]:
        documents = statement_documents(self._facts, seed=self._seed, epoch=epoch)
        return encode_documents(self._tokenizer, documents)

    def _windows(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self._seed, epoch])
            documents = self._sources + self._statements(epoch)
            stream = np.concatenate([documents[at] for at in order.permutation(len(documents))])
            start = int(order.integers(self.length))
            size = self.length + 1
            windows = stream[start : start + self.count * size].reshape(self.count, size)
            self._epoch = epoch, windows[order.permutation(self.count)]
        return self._epoch[1]

    def batch(self, step: int, *, rows: int) -> np.ndarray:
        """The batch of a step: int32 [rows, length + 1], a pure function of (seed, step, rows)."""
        epoch, at = divmod(step, self.count // rows)
        return self._windows(epoch)[at * rows : (at + 1) * rows].astype(np.int32)


def held_out_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, length: int, rows: int
) -> np.ndarray:
    """The first `rows` windows of the held-out files, int32 [rows, length + 1]."""
    documents = encode_documents(tokenizer, [file.text for file in corpus.held_out])
    stream = np.concatenate(documents)
    size = length + 1
    rows = min(rows, len(stream) // size)
    return stream[: rows * size].reshape(rows, size).astype(np.int32)
