"""Heads in place of the output layer: read by class and labels, refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import Head, ModelConfig
from llmserve.errors import ConfigError
from llmserve.families import family_of, parse_config, render_config
from llmserve.layouts import expected_tensors, stored_name, written_name
from llmserve.model.transformer import Transformer
from support.published import parse_minimal
from support.variants import GEMMA2, GPT2, LLAMA, OLMO2, random_tensors

CLASSIFIER = Head(kind="sequence", labels=("no", "yes", "perhaps"))
REWARD = Head(kind="sequence", labels=("reward",))
TAGGER = Head(kind="token", labels=("person", "place"))
SPAN = Head(kind="span", labels=("start", "end"))
EMBEDDING = Head(kind="embedding")
HEADS = {"classifier": CLASSIFIER, "reward": REWARD, "tagger": TAGGER, "span": SPAN}
HEADS |= {"embedding": EMBEDDING}


def with_head(config: ModelConfig, head: Head) -> ModelConfig:
    return dataclasses.replace(config, head=head)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("LlamaForCausalLM", None),
        ("LlamaForRewardWithoutAName", None),
        ("GPT2LMHeadModel", None),
        ("LlamaForSequenceClassification", Head(kind="sequence", labels=("LABEL_0", "LABEL_1"))),
        ("LlamaForTokenClassification", Head(kind="token", labels=("LABEL_0", "LABEL_1"))),
        ("LlamaForQuestionAnswering", SPAN),
        ("LlamaModel", EMBEDDING),
    ],
)
def test_class_says_what_the_head_is(name: str, head: Head | None) -> None:
    assert parse_minimal("llama", architectures=[name]).head == head


def test_labels_are_named_or_counted() -> None:
    def labels(**values: Any) -> tuple[str, ...]:
        config = parse_minimal("llama", architectures=["LlamaForTokenClassification"], **values)
        assert config.head is not None
        return config.head.labels

    assert labels(num_labels=3) == ("LABEL_0", "LABEL_1", "LABEL_2")
    names = {str(index): f"n{index}" for index in range(12)}
    assert labels(id2label=names) == tuple(names.values())
    assert labels(id2label=names, num_labels=12) == tuple(names.values())


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_head_survives_its_file(config: ModelConfig, head: Head) -> None:
    config = with_head(config, head)
    for family in (family_of(config), "llmserve"):
        values = json.loads(json.dumps(render_config(config, family)))  # type: ignore[arg-type]
        assert parse_config(values) == config


@pytest.mark.parametrize(
    ("config", "head"), [(OLMO2, TAGGER), (OLMO2, SPAN), (GEMMA2, SPAN)], ids=str
)
def test_head_that_transformers_has_no_class_for_is_ours_alone(
    config: ModelConfig, head: Head
) -> None:
    assert family_of(with_head(config, head)) == "llmserve"
    assert family_of(with_head(config, CLASSIFIER)) == family_of(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": "LlamaModel"}, "architectures"),
        ({"architectures": [3]}, "architectures"),
        ({"num_labels": 0}, "num_labels"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "num_labels"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "x": "b"}}, "id2label"),
        ({"id2label": ["a"]}, "id2label"),
        ({"id2label": {"0": 7}}, "head.labels"),
        ({"token_classification_bias": False}, "token_classification_bias"),
    ],
)
def test_what_makes_no_head_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    values = {"architectures": ["LlamaForTokenClassification"], **changes}
    with pytest.raises(ConfigError, match=named):
        parse_minimal("llama", **values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "pooled"}, "head.kind"),
        ({"kind": "sequence"}, "head.labels"),
        ({"kind": "span", "labels": ("from", "to")}, "start, end"),
        ({"kind": "embedding", "labels": ("a",)}, "embedding has none"),
    ],
)
def test_labels_that_do_not_fit_the_kind_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Head(**values)


def test_head_takes_the_place_of_the_output_layer() -> None:
    untied = dataclasses.replace(LLAMA, tie_word_embeddings=False)
    plain = expected_tensors(LLAMA).keys()
    found = {
        name: expected_tensors(with_head(untied, head)).keys() - plain
        for name, head in HEADS.items()
    }
    assert found == {
        "classifier": {"score.weight"},
        "reward": {"score.weight"},
        "tagger": {"score.weight", "score.bias"},
        "span": {"qa_outputs.weight", "qa_outputs.bias"},
        "embedding": set(),
    }


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_weights_survive_their_folder(tmp_path: Path, config: ModelConfig, head: Head) -> None:
    config = with_head(config, head)
    tensors = random_tensors(config)
    save_model(tmp_path / "m", config, tensors)
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.config == config
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.array(name), values)


def test_names_with_another_beginning_or_none_are_known() -> None:
    assert stored_name("layers.0.mlp.up_proj.weight", "qwen3") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert stored_name("transformer.norm.weight", "llama") == "model.norm.weight"
    assert stored_name("transformer.norm.weight", "llmserve") == "transformer.norm.weight"
    assert stored_name("score.weight", "gpt2") == "score.weight"
    spans = with_head(LLAMA, SPAN)
    assert written_name("model.norm.weight", spans, "llama") == "transformer.norm.weight"
    assert written_name("qa_outputs.bias", spans, "llama") == "qa_outputs.bias"
    assert written_name("model.norm.weight", spans, "mistral") == "model.norm.weight"
    assert written_name("model.norm.weight", LLAMA, "llama") == "model.norm.weight"


def test_model_has_scores_or_logits_and_says_which() -> None:
    hidden = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    classifier = Transformer(with_head(LLAMA, CLASSIFIER))
    assert classifier.scores(hidden).shape == (3, 3)
    with pytest.raises(ConfigError, match=r"head \(sequence\) in place of an output layer"):
        classifier.logits(hidden)
    with pytest.raises(ConfigError, match="no head"):
        Transformer(LLAMA).scores(hidden)
    embedding = Transformer(with_head(LLAMA, EMBEDDING)).bfloat16()
    assert torch.equal(embedding.scores(hidden.bfloat16()), hidden.bfloat16().float())
