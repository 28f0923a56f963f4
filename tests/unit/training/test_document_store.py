"""Documents on disk: every text comes back, and memory does not grow with them."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import DataError
from llmserve.training.corpus import read_corpus
from llmserve.training.document_store import ChosenDocuments, DocumentStore

TEXTS = ["one", "", "zwölf\r\n", "\u2028 three", "𝄞"]


def test_texts_come_back_in_their_order() -> None:
    store = DocumentStore(TEXTS[:2])
    assert list(store) == TEXTS[:2]
    for text in TEXTS[2:]:
        store.append(text)
        assert store[len(store) - 1] == text
    assert list(store) == TEXTS
    assert store[1:4] == TEXTS[1:4]
    assert store[-1] == TEXTS[-1]
    with pytest.raises(IndexError):
        store[len(TEXTS)]


def test_some_of_them_are_read_by_their_places() -> None:
    store = DocumentStore(TEXTS)
    chosen = ChosenDocuments(ChosenDocuments(store, [4, 0, 2]), [2, 0])
    assert list(chosen) == [TEXTS[2], TEXTS[4]]
    assert chosen[-1] == TEXTS[4]
    assert len(chosen) == 2


def test_full_disk_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DocumentStore()

    class Full:
        def write(self, data: bytes) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_file", Full())
    with pytest.raises(DataError, match=r"No space left.*TMPDIR"):
        store.append("text")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_preparing_a_corpus_takes_far_less_memory_than_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("llmserve.training.data_pieces.PIECE_BYTES", 1 << 16)
    documents = [f"{number} " + "some words of it " * 240 for number in range(1000)]
    path = tmp_path / f"corpus.{kind}"
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(
                f"{json.dumps({'text': document})}\n" if kind == "jsonl" else f"{document}\n\n"
            )
    assert path.stat().st_size > 3_900_000
    del documents
    tracemalloc.start()
    corpus = read_corpus([str(path)], held_out=0.1, cleaning="controls,spaces,duplicates")
    total = sum(map(len, corpus.train)) + sum(map(len, corpus.held_out))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 3_900_000
    assert peak < 1_500_000
