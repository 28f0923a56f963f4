"""A small model of every family learns, by all its weights and by LoRA, and stays of its family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.families import family_of
from llmserve.model.attention import CausalAttention
from llmserve.model.weights import load_model
from llmserve.text.tokenizer import Tokenizer
from llmserve.training import finetune_finish
from support.finetuning import finetune, rows_for, tiny_finetune_recipe, write_rows
from support.models import TEXT
from support.variants import VARIANTS, random_tensors

# transformers leaves its JSON files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma2", "gemma3_text", "mixtral",
    "qwen2_moe", "qwen3_moe", "gpt2",
)  # fmt: skip
TUNED_WHOLE = ("llama", "gemma3_text", "qwen2_moe", "gpt2")  # those whose tensors differ most
TOLERANCE = 1e-4  # float32 logits of size 1 to 10, summed in another order


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    yield module
    module.logging.set_verbosity_warning()
    module.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "texts.jsonl", rows_for("text", count=8))


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without drawing, which takes as long as all their steps."""
    monkeypatch.setattr(finetune_finish, "draw_loss_curve", lambda path, lines: None)


def make_family(folder: Path, family: str, tokenizer: Tokenizer) -> ModelConfig:
    config = dataclasses.replace(
        VARIANTS[family],
        vocab_size=tokenizer.vocab_size,
        bos_token_id=0,
        eos_token_ids=(0,),
        pad_token_id=None,
    )
    save_model(folder, config, random_tensors(config, scale=0.2), extra_files=tokenizer.files())
    assert family_of(config) == family
    return config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300)


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "lora") for family in FAMILIES), *((family, "full") for family in TUNED_WHOLE)],
)
def test_one_step_lowers_the_loss_and_the_folder_opens_there(
    transformers: Any, tokenizer: Tokenizer, rows: Path, tmp_path: Path, family: str, method: str
) -> None:
    config = make_family(tmp_path / "base", family, tokenizer)
    recipe = tiny_finetune_recipe(
        task="text", method=method, steps=1, warmup=0.0, batch_size=8, held_out=0.5, keep="last"
    )
    result = finetune(recipe, tmp_path / "base", rows, tmp_path / "run").result
    assert result is not None
    assert result["after"]["held_out_loss"] < result["before"]["held_out_loss"]

    folder = tmp_path / "run" / "model"
    tuned = Checkpoint.open(folder)
    assert tuned.config == config
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(load_model(tuned)(ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "task", "name"),
    [
        ("llama", "classify", "LlamaForSequenceClassification"),
        ("llama", "span", "LlamaForQuestionAnswering"),
        ("llama", "embed", "LlamaModel"),
        ("mistral", "reward", "MistralForSequenceClassification"),
        ("gpt2", "span", "GPT2ForQuestionAnswering"),
        ("qwen3_moe", "classify", "Qwen3MoeForSequenceClassification"),
    ],
)
def test_tuned_heads_open_there_with_the_same_scores(
    transformers: Any, tokenizer: Tokenizer, tmp_path: Path, family: str, task: str, name: str
) -> None:
    make_family(tmp_path / "base", family, tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", rows_for(task))
    recipe = tiny_finetune_recipe(task=task, method="lora", steps=2, max_tokens=48)
    finetune(recipe, tmp_path / "base", data, tmp_path / "run")
    theirs, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(Checkpoint.open(tmp_path / "run" / "model"))
    ids = torch.randint(1, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs.eval()(ids)
        scores = ours.scores(ours.hidden(ids, torch.arange(20), CausalAttention(ours.config)))
    if "start_logits" in found:
        expected = torch.stack((found.start_logits, found.end_logits), dim=-1)
    elif "logits" in found:
        expected, scores = found.logits, scores[:, -1]
    else:
        expected = found.last_hidden_state
    torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
