"""Of a conversation the assistant's words are learned, all of them and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.errors import ConfigError, DataError
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.batches import IGNORED
from llmserve.training.finetune_chats import PLAIN_TEMPLATE, ChatEncoder, read_chat, read_prompt
from llmserve.training.finetune_examples import TokenRow
from llmserve.training.finetune_rows import Row
from support.models import TEXT

MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello dog"},
    {"role": "assistant", "content": "Hello Lily 🙂"},
    {"role": "user", "content": "and you?"},
    {"role": "assistant", "content": "in the park"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", [TEXT] * 4, vocab_size=320)


def learned(tokenizer: Tokenizer, row: TokenRow) -> str:
    """The text of the targets; a gap is shown as a bar."""
    parts, last = [], IGNORED
    for target in row.targets:
        if target == IGNORED and last != IGNORED:
            parts.append("|")
        elif target != IGNORED:
            parts.append(tokenizer.token_bytes(target).decode("latin-1"))
        last = target
    return "".join(parts).encode("latin-1").decode()


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_answers_and_what_ends_them_are_learned(kind: Any) -> None:
    tokenizer = Tokenizer.train(kind, [TEXT] * 4, vocab_size=320)
    row = ChatEncoder(tokenizer).encode(MESSAGES, "p")
    end = "<|endoftext|>"
    assert learned(tokenizer, row) == f"Hello Lily 🙂{end}|in the park{end}|"
    assert row.ids[0] == tokenizer.bos_token_id
    assert ChatEncoder(tokenizer).end_id(row) == tokenizer.eos_token_id


def test_only_answers_from_a_message_on_are_learned(tokenizer: Tokenizer) -> None:
    row = ChatEncoder(tokenizer).encode(MESSAGES, "p", first=3)
    assert learned(tokenizer, row) == "in the park<|endoftext|>|"


def test_the_prompt_is_that_of_serving(tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(tokenizer)
    row = encoder.encode(MESSAGES, "p", first=4)
    text = tokenizer.decode(row.ids, skip_special_tokens=False)
    first = next(i for i, target in enumerate(row.targets) if target != IGNORED)
    prompt = tokenizer.decode(row.ids[: first + 1], skip_special_tokens=False)
    assert prompt.endswith("### user:\nand you?\n\n### assistant:\n")
    assert text.startswith("<|endoftext|>### system:\nbe kind\n\n### user:\nhello dog")


def test_a_template_of_its_own_ends_answers_its_own_way(tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(tokenizer, template=CHATML)
    row = encoder.encode(MESSAGES, "p")
    assert learned(tokenizer, row) == "Hello Lily 🙂<|im_end|>|in the park<|im_end|>|"
    assert encoder.end_id(row) is None  # no special token of this tokenizer


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Tokenizer) -> None:
    last_only = "{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="p: the chat template renders message 3 otherwise"):
        ChatEncoder(tokenizer, template=last_only).encode(MESSAGES, "p")


def test_rows_of_three_shapes_are_conversations() -> None:
    one = {"role": "user", "content": "2+2?"}
    two = {"role": "assistant", "content": "4"}
    for values in (
        {"messages": [one, two]},
        {"prompt": "2+2?", "response": "4"},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"prompt": [one], "response": "4"},
    ):
        assert read_chat(Row("p", values)) == [one, two]
    together = read_prompt(Row("p", {"instruction": "add", "input": "2, 2"}))
    assert together == [{"role": "user", "content": "add\n\n2, 2"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": "hi"}, "must be a list of messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1: must have a role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is not the assist"),
        ({"messages": []}, "the last message is not the assist"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "message 1: the response is empty"),
        ({"prompt": "x", "response": ""}, "the field 'response' is empty"),
        ({"instruction": "x"}, "the field 'output' must be a string"),
    ],
)
def test_rows_of_other_shapes_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^p: .*{message}"):
        read_chat(Row("p", values))


def test_a_broken_template_and_a_tokenizer_without_an_end_are_refused(
    tokenizer: Tokenizer,
) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        ChatEncoder(tokenizer, template="{% for %}")
    nameless = Tokenizer(tokenizer.files()["tokenizer.json"], {})
    with pytest.raises(ConfigError, match="give a template with --chat-template"):
        ChatEncoder(nameless)
    assert ChatEncoder(tokenizer).source == PLAIN_TEMPLATE
