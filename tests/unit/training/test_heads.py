"""Losses and figures of the heads, against plain loops over single rows."""

from __future__ import annotations

import math

import pytest
import torch

from llmserve.config import Head
from llmserve.errors import DataError
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.eval_scores import exact_match
from llmserve.training.finetune_chats import ChatEncoder
from llmserve.training.finetune_examples import Lengths, TokenRow
from llmserve.training.finetune_model import TunedModel
from llmserve.training.finetune_rows import Row
from llmserve.training.heads_classify import ClassifyTask, find_labels
from llmserve.training.heads_embed import EmbedTask
from llmserve.training.heads_reward import RewardTask
from llmserve.training.heads_span import SpanExample, SpanTask, best_span
from support.models import TEXT
from support.training_runs import tiny_config
from support.tuned import make_tuned


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300)


def made(head: Head) -> TunedModel:
    return make_tuned(config=tiny_config(head=head, max_seq_len=64))


def lengths(limit: int = 64) -> Lengths:
    return Lengths(limit, "truncate")


@torch.no_grad()
def scores_alone(tuned: TunedModel, row: TokenRow) -> torch.Tensor:
    """[T, labels] of one row by itself."""
    return tuned.scores(torch.tensor([row.ids]))[0]


def test_classifier_scores_the_last_token(tokenizer: Tokenizer) -> None:
    rows = [Row(str(n), {"text": "hello " * n, "label": n % 3}) for n in range(1, 9)]
    labels = find_labels(rows)
    assert labels == ("0", "1", "2")
    task = ClassifyTask(tokenizer, labels)
    tuned = made(task.head)
    examples = [task.example(row, lengths()) for row in rows]
    alone = [scores_alone(tuned, example.rows[0])[-1] for example in examples]
    expected = sum(
        -float(scores.log_softmax(-1)[example.label])
        for scores, example in zip(alone, examples, strict=True)
    )
    with torch.no_grad():
        assert float(task.loss(tuned, examples)) == pytest.approx(expected, rel=1e-5)
        assert task.predict(tuned, examples) == [labels[int(s.argmax())] for s in alone]
        figures = task.figures(tuned, examples)
    hits = [int(s.argmax()) == example.label for s, example in zip(alone, examples, strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_one_label_makes_no_classifier() -> None:
    with pytest.raises(DataError, match="every row has the label 'a'"):
        find_labels([Row("p", {"label": "a"})] * 3)


def test_reward_is_the_pairwise_loss_of_last_scores(tokenizer: Tokenizer) -> None:
    task = RewardTask(ChatEncoder(tokenizer))
    tuned = made(task.head)
    rows = [{"prompt": "hi", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 6)]
    examples = [task.example(Row("p", row), lengths()) for row in rows]
    expected, wins = 0.0, 0
    for example in examples:
        good, bad = (float(scores_alone(tuned, row)[-1, 0]) for row in example.rows)
        expected += math.log1p(math.exp(bad - good))
        wins += good > bad
    with torch.no_grad():
        assert float(task.loss(tuned, examples)) == pytest.approx(expected, rel=1e-4)
        assert task.figures(tuned, examples)["accuracy"] == pytest.approx(wins / 5)
    with pytest.raises(DataError, match="p: the chosen and the rejected answer are the same"):
        task.example(Row("p", {"prompt": "a", "chosen": "b", "rejected": "b"}), lengths())


def test_embedding_compares_each_query_with_all_texts_but_its_twins(tokenizer: Tokenizer) -> None:
    task = EmbedTask(tokenizer, temperature=0.1)
    tuned = made(task.head)
    texts = ["a dog", "the park", "a dog", "Lily"]
    rows = [{"query": f"q{n}", "positive": text} for n, text in enumerate(texts)]
    rows[3]["negative"] = "the park"
    examples = [task.example(Row("p", row), lengths()) for row in rows]

    def vector(row: TokenRow) -> torch.Tensor:
        mean = scores_alone(tuned, row).mean(dim=0)
        return mean / mean.norm()

    queries = [vector(example.rows[0]) for example in examples]
    others = [vector(example.rows[1]) for example in examples] + [vector(examples[3].rows[2])]
    twins = {(0, 2), (2, 0), (1, 4)}
    expected = 0.0
    for i, query in enumerate(queries):
        close = {j: float(query @ v) / 0.1 for j, v in enumerate(others) if (i, j) not in twins}
        expected -= close[i] - math.log(sum(map(math.exp, close.values())))
    with torch.no_grad():
        assert float(task.loss(tuned, examples)) == pytest.approx(expected, rel=1e-4)
        figures = task.figures(tuned, examples)
    assert 0.0 <= figures["recall_at_1"] <= figures["mean_reciprocal_rank"] <= 1.0


def squad(context: str, answer: str, question: str = "where?") -> dict[str, object]:
    answers = [{"text": answer, "answer_start": context.index(answer)}]
    return {"question": question, "context": context, "answers": answers}


@pytest.mark.parametrize("answer", ["the park", "Zoë 🙂", "He", "日本", "the park, again."])
def test_the_right_span_is_the_answer(tokenizer: Tokenizer, answer: str) -> None:
    context = "He met Zoë 🙂 in 日本 and the park, again."
    task = SpanTask(tokenizer)
    example = task.example(Row("p", squad(context, answer)), lengths(128))
    assert isinstance(example, SpanExample)
    width = len(example.rows[0].ids)
    scores = torch.zeros((2, width))
    scores[0, example.start] = scores[1, example.end] = 9.0
    assert exact_match(best_span(example, scores), [answer]) == 1.0


def test_span_loss_and_answer_are_those_of_a_plain_search(tokenizer: Tokenizer) -> None:
    task = SpanTask(tokenizer)
    tuned = make_tuned(config=tiny_config(head=task.head, max_seq_len=128))
    rows = [squad("She is in the park. " * n + "A dog.", "A dog") for n in range(1, 5)]
    examples = [task.example(Row("p", row), lengths(128)) for row in rows]
    expected, found = 0.0, []
    for example in examples:
        scores = scores_alone(tuned, example.rows[0])[example.first :]
        both = scores.log_softmax(0)
        first = example.first
        expected -= float(both[example.start - first, 0] + both[example.end - first, 1]) / 2
        pairs = {
            (i, j): float(scores[i, 0] + scores[j, 1])
            for i in range(len(scores))
            for j in range(i, min(i + 30, len(scores)))
        }
        low, high = max(pairs, key=lambda pair: pairs[pair])
        text = example.context[example.offsets[low][0] : example.offsets[high][1]]
        found.append(text.strip())
    with torch.no_grad():
        assert float(task.loss(tuned, examples)) == pytest.approx(expected, rel=1e-4)
        assert task.predict(tuned, examples) == found


def test_an_answer_behind_the_cut_is_not_learned_but_counts_as_wrong(tokenizer: Tokenizer) -> None:
    task = SpanTask(tokenizer)
    context = "She is in the park. " * 6 + "A dog."
    limit = lengths(40)
    example = task.example(Row("p", squad(context, "A dog")), limit)
    assert isinstance(example, SpanExample)
    assert (task.units(example), limit.num_truncated) == (0, 1)
    tuned = made(task.head)
    with torch.no_grad():
        assert float(task.loss(tuned, [example])) == 0.0
        assert task.figures(tuned, [example])["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "has no answers"),
        ({"answers": [{"text": "dog", "answer_start": 3}]}, "does not stand in the text there"),
        ({"answers": "cat"}, "does not stand in the text there"),
        ({"question": "why " * 100}, "the question leaves no room for its text"),
        ({"context": ""}, "the field 'context' is empty"),
    ],
)
def test_questions_that_cannot_be_used_are_refused(
    tokenizer: Tokenizer, change: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=f"^p: .*{message}"):
        SpanTask(tokenizer).example(Row("p", {**squad("a dog", "dog"), **change}), lengths())
