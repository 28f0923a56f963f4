"""The demonstration corpus, built from a small library made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.training import python_manual
from llmserve.training.python_manual import DOCUMENT_SEPARATOR, build_manual

MODULE = '''
"""Reading and writing of files that hold nothing but numbers.

    >>> import numbersfile
"""

class Reader:
    """A reader that gives the numbers of one file in their order."""

    def close(self):
        """Close the file that the numbers come from."""

def open_file(path):
    """Open the file at the given path and return a reader of it."""
    def inner():
        """Functions inside of functions have docstrings too, sometimes."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text('"""This is a test and no manual of anything."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "numbersfile.py").write_text(MODULE)
    monkeypatch.setattr("pydoc_data.topics.topics", {"a": "The topic of this text is that text."})
    monkeypatch.setattr(python_manual, "MIN_DOCUMENT_CHARS", 10)
    return tmp_path


def test_documents_are_topics_modules_and_classes(library: Path) -> None:
    corpus = build_manual(library)
    assert corpus.text.rstrip("\n").split(DOCUMENT_SEPARATOR) == [
        "The topic of this text is that text.",
        "Reading and writing of files that hold nothing but numbers.\n\n"
        "Open the file at the given path and return a reader of it.\n\n"
        "Functions inside of functions have docstrings too, sometimes.",
        "A reader that gives the numbers of one file in their order.\n\n"
        "Close the file that the numbers come from.",
    ]
    assert corpus.num_documents == 3


def test_same_library_gives_the_same_digest(library: Path) -> None:
    first = build_manual(library)
    assert build_manual(library).sha256 == first.sha256
    (library / "another.py").write_text('"""One module more, with a sentence to be read."""')
    assert build_manual(library).sha256 != first.sha256
