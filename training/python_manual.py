"""The demonstration corpus: English prose that every Python installation already holds.

Two sources: the interpreter's own manual (`pydoc_data.topics`, the text behind `help()`) and the
docstrings of the standard library, read with `ast` and never imported. Both are cut into
paragraphs; those that are code, tables, signatures or markup go, and so does what was said before
(exactly or nearly), since a model that meets a sentence ten times learns to recite it. What is
left is plain ASCII prose, one document per topic, module or class.

The text depends on the Python version and on nothing else: the same interpreter gives the same
bytes, whose sha256 is recorded with everything trained on them.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .prose import NoveltyFilter, prose_paragraphs

__all__ = ["DOCUMENT_SEPARATOR", "ManualCorpus", "build_manual"]

DOCUMENT_SEPARATOR = "\n\n\n"
"""Between documents; paragraphs inside one are a single empty line apart."""

# Test suites, applications, generated tables and others' packages: no manual of the library.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
MIN_DOCUMENT_CHARS = 60

# Fields of a statement that hold statements; expressions hold no docstrings.
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


@dataclass(frozen=True, slots=True)
class ManualCorpus:
    """The finished text and where it came from."""

    text: str
    num_documents: int
    python_version: str

    @property
    def sha256(self) -> str:
        """Digest of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def build_manual(library: Path | None = None) -> ManualCorpus:
    """Collect and clean the manual of the running interpreter; some seconds.

    `library` is the folder of standard-library sources; None: the interpreter's own.
    """
    novelty = NoveltyFilter()
    documents = []
    for text in _raw_documents(library or Path(sysconfig.get_path("stdlib"))):
        paragraphs = [p for p in prose_paragraphs(text) if novelty.is_new(p)]
        document = "\n\n".join(paragraphs)
        if len(document) >= MIN_DOCUMENT_CHARS:
            documents.append(document)
    version = ".".join(str(part) for part in sys.version_info[:3])
    text = DOCUMENT_SEPARATOR.join(documents) + "\n"
    return ManualCorpus(text=text, num_documents=len(documents), python_version=version)


def _raw_documents(library: Path) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            yield from _module_documents(path)


def _module_documents(path: Path) -> Iterator[str]:
    """One text for the module and its functions, then one for each class with its methods."""
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a sample of broken or foreign syntax, of which old libraries have a few
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    others = [node for node in module.body if not isinstance(node, ast.ClassDef)]
    yield _join([ast.get_docstring(module), *_docstrings(others)])
    for node in classes:
        yield _join(_docstrings([node]))


def _docstrings(statements: Iterable[ast.AST]) -> Iterator[str | None]:
    """Docstrings in and below `statements`, block by block."""
    for statement in statements:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(statement)
        for block in _BLOCKS:
            yield from _docstrings(getattr(statement, block, ()))


def _join(docstrings: Iterable[str | None]) -> str:
    return "\n\n".join(text for text in docstrings if text)
