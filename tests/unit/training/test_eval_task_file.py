"""Task files: what they say, and what is wrong with those that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.errors import ConfigError, DataError
from llmserve.training.eval_task_file import read_task
from support.finetuning import write_rows

ROWS = [{"question": "sky?", "label": "blue"}, {"question": "grass?", "label": "green"}]


def write(tmp_path: Path, text: str) -> Path:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    path = tmp_path / "task.toml"
    path.write_text(text)
    return path


def test_prompts_and_choices_are_filled_in(tmp_path: Path) -> None:
    task = read_task(
        write(
            tmp_path,
            'kind = "choice"\ndata = "rows.jsonl"\nprompt = "Q: {question}\\nA:"\n'
            'choices = [" blue", " green"]\nanswer = "label"\n',
        )
    )
    assert task.name == "task"
    assert [task.prompt_of(row) for row in task.rows] == ["Q: sky?\nA:", "Q: grass?\nA:"]
    assert task.choices_of(task.rows[0]) == [" blue", " green"]
    assert [task.right_choice(row) for row in task.rows] == [0, 1]


def test_rows_of_prompts_are_a_task_by_themselves(tmp_path: Path) -> None:
    choice = [{"prompt": "sky", "choices": ["a", "b"], "answer": 1}] * 3
    task = read_task(write_rows(tmp_path / "c.jsonl", choice), limit=2)
    assert (task.kind, len(task.rows), task.right_choice(task.rows[0])) == ("choice", 2, 1)
    generate = [{"prompt": "sky", "answer": ["blue", "grey"]}]
    task = read_task(write_rows(tmp_path / "g.jsonl", generate))
    assert task.kind == "generate"
    assert task.right_answers(task.rows[0]) == ("blue", "grey")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 3\n", "needs 'data'"),
        ('kind = "poem"\ndata = "rows.jsonl"\n', "kind must be one of choice"),
        ('kind = "text"\ndata = "rows.jsonl"\nstride = 1\n', r"unknown settings \['stride'\]"),
        ('kind = "choice"\ndata = "rows.jsonl"\nchoices = [1]\n', "choices must be a text or a"),
        ('kind = "choice"\ndata = "rows.jsonl"\ncolumns = 1\n', "columns must be a table"),
        ('kind = "generate"\ndata = "rows.jsonl"\nmax_new_tokens = 0\n', "must be at least 1"),
        ("kind = ", "no TOML file that can be read"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_task(write(tmp_path, text))


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": "sky", "choices": ["a"], "answer": 0},
        {"prompt": "sky", "choices": ["a", "b"], "answer": "c"},
        {"prompt": "sky", "choices": ["a", "b"], "answer": 2},
        {"answer": 3},
    ]
    path = write_rows(tmp_path / "c.jsonl", rows)
    task = read_task(path)
    with pytest.raises(DataError, match=r"line 1: needs two or more choices"):
        task.choices_of(task.rows[0])
    for place in (1, 2):
        with pytest.raises(DataError, match=f"line {place + 1}: 'answer' is .*, neither one of"):
            task.right_choice(task.rows[place])
    with pytest.raises(DataError, match=r"line 4: no field 'prompt'"):
        task.prompt_of(task.rows[3])
    with pytest.raises(DataError, match=r"line 4: 'answer' must be a text"):
        task.right_answers(task.rows[3])
