"""Rows become examples; what is cut or left out is counted, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.errors import DataError
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.finetune_data import SplitRows, make_examples, read_split
from llmserve.training.finetune_language import TextTask
from llmserve.training.finetune_rows import Row
from llmserve.training.heads_span import SpanTask
from support.finetuning import rows_for, tiny_finetune_recipe, write_rows
from support.models import TEXT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300)


def test_held_out_data_of_its_own_replaces_the_share(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", rows_for("text"))
    two = write_rows(tmp_path / "two.jsonl", rows_for("text", count=3, seed=1))
    recipe = tiny_finetune_recipe(task="text")
    split = read_split(recipe, [one], [])
    assert len(split.train) + len(split.held_out) == 24 == len(split.all)
    apart = read_split(recipe, [one], [two])
    assert (len(apart.train), len(apart.held_out)) == (24, 3)


def test_what_is_cut_or_left_out_is_counted(tokenizer: Tokenizer) -> None:
    texts = [Row(str(n), {"text": "Lily " * n}) for n in (1, 2, 30, 40)]
    recipe = tiny_finetune_recipe(task="text")
    made = make_examples(TextTask(tokenizer), SplitRows(texts, texts[2:]), recipe, 16)
    assert made.counts == {
        "train_rows": 4, "train_truncated": 2, "train_dropped": 0,
        "held_out_rows": 2, "held_out_truncated": 2, "held_out_dropped": 0,
    }  # fmt: skip
    assert made.notes == ["train: 2 texts cut to 16 tokens", "held out: 2 texts cut to 16 tokens"]
    dropped = make_examples(
        TextTask(tokenizer),
        SplitRows(texts, []),
        tiny_finetune_recipe(task="text", overlong="drop"),
        16,
    )
    assert (dropped.counts["train_rows"], dropped.counts["train_dropped"]) == (2, 2)
    with pytest.raises(DataError, match="no row is left to train on: all 2 were longer than 16"):
        make_examples(
            TextTask(tokenizer),
            SplitRows(texts[2:], []),
            tiny_finetune_recipe(task="text", overlong="drop"),
            16,
        )


def test_answers_that_were_cut_off_are_kept_only_where_they_are_scored(
    tokenizer: Tokenizer,
) -> None:
    context = "She is outside. " * 9 + "A dog."
    answers = [{"text": "A dog", "answer_start": context.index("A dog")}]
    early = [{"text": "She", "answer_start": 0}]
    rows = [
        Row("late", {"question": "who?", "context": context, "answers": answers}),
        Row("early", {"question": "who?", "context": context, "answers": early}),
    ]
    recipe = tiny_finetune_recipe(task="span")
    made = make_examples(SpanTask(tokenizer), SplitRows(rows, rows), recipe, 40)
    assert (len(made.train), len(made.held_out)) == (1, 2)
    assert made.counts["train_dropped"] == 1


def test_a_text_that_is_no_text_is_named_by_its_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b \ud800"}) + "\n")
    split = read_split(tiny_finetune_recipe(task="text", held_out=0.0), [path], [])
    with pytest.raises(DataError, match=r"line 2: the text holds the surrogate '\\ud800'"):
        make_examples(TextTask(tokenizer), split, tiny_finetune_recipe(task="text"), 16)
