"""Classifiers, spans and embeddings of transformers open here and ours there, with equal scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.families import family_of
from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_model
from support.theirs import HEADS, make_with_head

# transformers leaves its JSON files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

TOLERANCE = 1e-4  # float32 values of size 1 to 10, summed in another order
IDS = torch.randint(1, 67, (2, 20), generator=torch.Generator().manual_seed(0))  # none is padding


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    yield module
    module.logging.set_verbosity_warning()
    module.logging.enable_progress_bar()


@torch.inference_mode()
def our_scores(model: Transformer) -> torch.Tensor:
    """What transformers would return: of a classifier, the last token's alone."""
    attend = CausalAttention(model.config)
    scores = model.scores(model.hidden(IDS, torch.arange(IDS.shape[1]), attend))
    assert model.config.head is not None
    return scores[:, -1] if model.config.head.kind == "sequence" else scores


@torch.inference_mode()
def their_scores(model: Any) -> torch.Tensor:
    found = model(IDS)
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits), dim=-1)
    scores: torch.Tensor = found.logits if "logits" in found else found.last_hidden_state
    return scores


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_theirs_and_saved_again_still_are(
    transformers: Any, tmp_path: Path, name: str
) -> None:
    theirs = make_with_head(transformers, name)
    theirs.save_pretrained(tmp_path / "theirs")
    source = Checkpoint.open(tmp_path / "theirs")
    expected = their_scores(theirs)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(our_scores(load_model(source)), expected, rtol=0, atol=TOLERANCE)

    assert family_of(source.config) != "llmserve"
    tensors = {tensor: source.stored(tensor) for tensor in source.names()}
    save_model(tmp_path / "ours", source.config, tensors)
    assert Checkpoint.open(tmp_path / "ours").config == source.config
    again, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(their_scores(again.eval()), expected, rtol=0, atol=TOLERANCE)
