"""One small model folder and one local server for all tests of a run that only read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.text.tokenizer import Tokenizer
from support.models import make_model_folder
from support.servers import LocalServer, local_server
from support.spelling import spell


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder; tests must not change it."""
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def server(model_folder: Path) -> Iterator[LocalServer]:
    """A server with default settings."""
    with local_server(model_folder) as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="session")
def speller(model_folder: Path, tokenizer: Tokenizer) -> Iterator[LocalServer]:
    """A server that always answers with the same sentence, then ends."""
    script = spell("she saw a 🙂 dog, and the dog said hello.", tokenizer)
    with local_server(model_folder, script=script) as server:
        yield server
