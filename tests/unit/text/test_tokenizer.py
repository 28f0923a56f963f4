"""Loading a folder, encoding, decoding, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import CheckpointError, RequestError
from llmserve.text.detokenizer import Detokenizer
from llmserve.text.tokenizer import Tokenizer
from support.texts import HARD_TEXTS, all_tokenizers, sentencepiece_json, trained

ADVERSARIAL = {
    "one letter": "a",
    "letters": "qzxjkvbwmpfgy",
    "replacement characters": "\ufffd",
    "emoji": "\U0001f600",
    "combining marks": "e\u0301\u0302\u0303",
    "white space": " \n\t  ",
}
NUM_CHARS = 200_000
# Thirty times what was measured: against growth with the square, not against a busy machine.
GENEROUS_CPU_S = 5.0


def write_folder(folder: Path, content: dict[str, object], **settings: object) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_special_tokens_come_from_the_config_of_the_tokenizer_first(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        sentencepiece_json(),
        tokenizer_config={"bos_token": {"content": "<s>"}, "pad_token": None},
        special_tokens_map={"bos_token": "<unk>", "unk_token": "<unk>"},
        config={"bos_token_id": 0, "eos_token_id": [2, 1], "pad_token_id": 0},
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assert tokenizer.special_ids == {0, 1, 2}


@pytest.mark.parametrize("special", [True, False])
def test_encoding_adds_what_the_file_says(tmp_path: Path, special: bool) -> None:
    tokenizer = Tokenizer.load(write_folder(tmp_path, sentencepiece_json()))
    tokens = [tokenizer.token_text(i) for i in tokenizer.encode("the", add_special_tokens=special)]
    assert tokens == (["<s>", " the"] if special else [" the"])


def test_batch_equals_one_by_one() -> None:
    for tokenizer in all_tokenizers():
        assert tokenizer.encode_batch(HARD_TEXTS) == [tokenizer.encode(t) for t in HARD_TEXTS]


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    content = sentencepiece_json()
    plain = Tokenizer.load(write_folder(tmp_path, content)).encode("hello hello")
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    assert Tokenizer.load(write_folder(tmp_path, content)).encode("hello hello") == plain


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "é\ud83d"])
def test_surrogates_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="surrogate") as caught:
        trained("bpe").encode(text)
    assert caught.value.param == "prompt"


def test_text_that_the_tokenizer_cannot_take_is_refused(tmp_path: Path) -> None:
    content = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"version": "1.0", **content}))
    with pytest.raises(RequestError, match="cannot be tokenized") as caught:
        tokenizer.encode("b")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("family", ADVERSARIAL)
def test_adversarial_text_takes_no_unreasonable_time(family: str) -> None:
    unit = ADVERSARIAL[family]
    text = (unit * (NUM_CHARS // len(unit) + 1))[:NUM_CHARS]
    for tokenizer in all_tokenizers():
        begin = time.process_time()
        tokenizer.encode(text)
        assert time.process_time() - begin < GENEROUS_CPU_S
        assert tokenizer.decode(tokenizer.encode(text[:5000])) == text[:5000]


def test_ids_without_a_token_have_no_text() -> None:
    tokenizer = trained("bpe")
    the = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.decode([-1, *the, tokenizer.vocab_size, 1 << 40]) == "the"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_token_bytes_add_up_to_the_text() -> None:
    for tokenizer in all_tokenizers():
        ids = tokenizer.encode("the 漢 é", add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined.removeprefix(" ") == "the 漢 é"


def test_token_text_shows_half_characters_as_replacements() -> None:
    first, *_ = trained("bpe").encode("漢", add_special_tokens=False)
    assert trained("bpe").token_bytes(first) == b"\xe6"
    assert trained("bpe").token_text(first) == "\ufffd"
    assert trained("bpe").token_text(0) == "<|endoftext|>"


def test_files_that_were_read_come_back_unchanged(tmp_path: Path) -> None:
    write_folder(tmp_path, sentencepiece_json(), tokenizer_config={"bos_token": "<s>", "x": 1})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    files = Tokenizer.load(tmp_path).files(model_max_length=7)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_files_of_a_folder_without_config_name_its_special_tokens(tmp_path: Path) -> None:
    write_folder(tmp_path, sentencepiece_json(), config={"bos_token_id": 1, "eos_token_id": 2})
    files = Tokenizer.load(tmp_path).files()
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("settings", "file", "template"),
    [
        ({"chat_template": "one"}, None, "one"),
        ({"chat_template": "one"}, "two", "two"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None, None),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "t"},
                    {"name": "default", "template": "d"},
                ]
            },
            None,
            "d",
        ),
        ({}, None, None),
    ],
)
def test_chat_template_is_found(
    tmp_path: Path, settings: dict[str, Any], file: str | None, template: str | None
) -> None:
    write_folder(tmp_path, sentencepiece_json(), tokenizer_config=settings)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert Tokenizer.load(tmp_path).chat_template == template


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"[]", "no JSON object"),
        ("tokenizer.json", b"\xff\xfe", "not valid JSON"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token must be a string"),
        ("tokenizer_config.json", b'{"eos_token": "</none>"}', "'</none>', which is not in"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is no string"),
        ("special_tokens_map.json", b'{"a": 1, "a": 1}', "occurs twice"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path: Path, name: str, data: bytes, cause: str) -> None:
    write_folder(tmp_path, sentencepiece_json())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=cause) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)


def test_pad_token_outside_the_vocabulary_is_none(tmp_path: Path) -> None:
    write_folder(tmp_path, sentencepiece_json(), tokenizer_config={"pad_token": "[PAD]"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_token_id is None
    assert tokenizer.special_tokens == {"pad_token": "[PAD]"}


@pytest.mark.shared
def test_real_checkpoint_decodes_its_known_text(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    ids = json.loads((stories260k / "expected-greedy-200.json").read_text())
    text = (stories260k / "expected-greedy-200.txt").read_text()
    assert len(text) == 464
    assert tokenizer.decode(ids) == text
    stream = Detokenizer(tokenizer, [1])
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == text


@pytest.mark.shared
def test_real_checkpoint_begins_texts_with_bos(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (512, 1, 2)
    assert tokenizer.encode("Once upon")[:2] == [1, 403]
    assert tokenizer.encode("Once upon", add_special_tokens=False)[0] == 403
    assert tokenizer.decode(tokenizer.encode("Once upon a 漢.")) == "Once upon a 漢."


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_offsets_say_which_characters_an_id_stands_for(kind: Any) -> None:
    text = "Once upon a time, Zoë 🙂 played: 日本!"
    tokenizer = Tokenizer.train(kind, ["Once upon a time there was a dog."] * 4, vocab_size=300)
    [(ids, offsets)] = tokenizer.encode_with_offsets([text])
    assert ids == tokenizer.encode(text)
    assert offsets[0] == (0, 0)  # the beginning that the tokenizer adds
    for token_id, (start, end) in zip(ids[1:], offsets[1:], strict=True):
        assert tokenizer.token_bytes(token_id) in text[start:end].encode()
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(text)))
