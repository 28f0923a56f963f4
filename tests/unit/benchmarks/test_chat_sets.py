from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.benchmarks.chat_sets import read_conversations
from llmserve.errors import DataError

SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "reply"},
        {"from": "human", "value": "two"},
    ],
}
MESSAGES = {"messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]}
ENTRIES = {
    "sharegpt": (SHAREGPT, ("one", "two")),
    "mt-bench": ({"question_id": 81, "turns": ["one", "two"]}, ("one", "two")),
    "gsm8k": ({"question": "one", "answer": "#### 2"}, ("one",)),
    "messages": (MESSAGES, ("one", "two")),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("is_array", [False, True])
def test_set_gives_what_users_said(tmp_path: Path, name: str, is_array: bool) -> None:
    entry, turns = ENTRIES[name]
    lines = json.dumps(entry) + "\n\n" + json.dumps(entry) + "\n"
    path = tmp_path / "set.json"
    path.write_text(json.dumps([entry, entry], indent=1) if is_array else lines, encoding="utf-8")
    assert read_conversations(path, name) == [turns, turns]


def test_conversation_in_which_no_user_speaks_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    silent = {"conversations": [{"from": "gpt", "value": "hello?"}]}
    path.write_text(f"{json.dumps(silent)}\n{json.dumps(SHAREGPT)}\n", encoding="utf-8")
    assert read_conversations(path, "sharegpt") == [("one", "two")]
    path.write_text(json.dumps(silent), encoding="utf-8")
    with pytest.raises(DataError, match="holds no conversation"):
        read_conversations(path, "sharegpt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: unexpected end"),
        ("[1]", 'line 2: expected an object with "turns"'),
        ('{"turns": "one"}', "a list of texts"),
        ('{"turns": ["a", 3]}', "a list of texts"),
    ],
)
def test_wrong_entry_is_named_with_what_was_expected(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"turns": ["a"]}\n' + line, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_conversations(path, "mt-bench")
    assert message in str(raised.value)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the prompts in"):
        read_conversations(tmp_path / "none.json", "sharegpt")
