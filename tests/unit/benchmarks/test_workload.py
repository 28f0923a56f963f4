from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmserve.benchmarks.workload import (
    Prompt,
    RandomLengths,
    align_to_text,
    random_prompts,
    sample_ids,
    text_prompts,
)
from llmserve.errors import ConfigError, DataError


class MergingTokenizer:
    """Ids are letters; reading the text again merges every `ab` into one id."""

    async def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text.replace("ab", "X")]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids)).replace("X", "ab")


class VanishingTokenizer:
    """Every text is two tokens."""

    async def tokenize(self, text: str) -> list[int]:
        return [65, 66]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "AB"


def id_prompt(text: str) -> Prompt:
    ids = [ord(letter) for letter in text]
    return Prompt(index=3, content=ids, num_tokens=len(ids), output_len=5)


def test_random_prompts_have_exactly_the_lengths_asked() -> None:
    lengths = RandomLengths(input_len=17, output_len=9)
    prompts = random_prompts(20, lengths, range(50), seed=0)
    assert [len(prompt.content) for prompt in prompts] == [17] * 20
    assert {prompt.num_tokens for prompt in prompts} == {17}
    assert {prompt.output_len for prompt in prompts} == {9}
    assert [prompt.index for prompt in prompts] == list(range(20))


def test_random_ids_cover_the_vocabulary_and_stay_in_it() -> None:
    prompts = random_prompts(50, RandomLengths(input_len=100), range(30), seed=0)
    drawn = {token_id for prompt in prompts for token_id in prompt.content}
    assert drawn == set(range(30))


def test_random_ids_come_from_the_pool_given() -> None:
    prompts = random_prompts(5, RandomLengths(input_len=100), [3, 8, 21], seed=0)
    assert {token_id for prompt in prompts for token_id in prompt.content} == {3, 8, 21}


def test_random_prompts_are_all_different() -> None:
    prompts = random_prompts(100, RandomLengths(input_len=16), range(1000), seed=0)
    assert len({tuple(prompt.content) for prompt in prompts}) == 100


def test_more_prompts_of_a_seed_begin_with_the_same_ones() -> None:
    lengths = RandomLengths(input_len=20, output_len=30, range_ratio=0.5)
    few, many = (random_prompts(count, lengths, range(99), seed=4) for count in (5, 12))
    assert many[:5] == few
    assert random_prompts(5, lengths, range(99), seed=5) != few


def test_range_ratio_spreads_lengths_uniformly_to_both_sides() -> None:
    lengths = RandomLengths(input_len=100, output_len=10, range_ratio=0.3)
    drawn = np.array(lengths.draw(np.random.default_rng(0), 4000))
    assert drawn.min(axis=0).tolist() == [70, 7]
    assert drawn.max(axis=0).tolist() == [130, 13]
    assert drawn.mean(axis=0) == pytest.approx([100, 10], rel=0.02)
    assert lengths.most == 143


def test_shortest_length_is_one_token() -> None:
    drawn = RandomLengths(input_len=1, output_len=1, range_ratio=0.9).draw(
        np.random.default_rng(0), 100
    )
    assert min(map(min, drawn)) == 1


@pytest.mark.parametrize(
    "wrong", [{"input_len": 0}, {"output_len": 0}, {"range_ratio": 1.0}, {"range_ratio": -0.1}]
)
def test_lengths_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RandomLengths(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["abc", "ababcabd", "cdefg", "bababab", "abababab", "c"])
def test_aligned_text_has_the_length_by_the_servers_tokenizer(text: str) -> None:
    tokenizer = MergingTokenizer()
    aligned = asyncio.run(align_to_text(id_prompt(text), tokenizer))
    assert isinstance(aligned.content, str)
    assert len(asyncio.run(tokenizer.tokenize(aligned.content))) == len(text)
    assert aligned.num_tokens == len(text)
    assert (aligned.index, aligned.output_len) == (3, 5)


def test_length_that_cannot_be_reached_is_told() -> None:
    aligned = asyncio.run(align_to_text(id_prompt("abcdef"), VanishingTokenizer()))
    assert (aligned.content, aligned.num_tokens) == ("AB", 2)


def test_sample_ids_are_those_of_an_english_text() -> None:
    ids = asyncio.run(sample_ids(MergingTokenizer()))
    assert ids == sorted(set(ids))
    assert {ord("e"), ord("t"), ord(" ")} <= set(ids)


def test_text_file_gives_a_prompt_for_each_line_again_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  \ntwo two\u2028still two\n", encoding="utf-8")
    prompts = text_prompts(path, 3, output_len=6)
    assert [prompt.content for prompt in prompts] == ["one", "two two\u2028still two", "one"]
    assert {(prompt.num_tokens, prompt.output_len) for prompt in prompts} == {(None, 6)}


def test_jsonl_file_may_say_the_answers_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "output_len": 3}\n{"prompt": "b"}\n', encoding="utf-8")
    prompts = text_prompts(path, 2, output_len=6)
    assert [(prompt.content, prompt.output_len) for prompt in prompts] == [("a", 3), ("b", 6)]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "unexpected end"),
        ('["a"]', '"prompt"'),
        ('{"prompt": ""}', '"prompt"'),
        ('{"prompt": "a", "output_len": 0}', "above 0"),
        ('{"prompt": "a", "output_len": true}', "above 0"),
    ],
)
def test_wrong_line_of_jsonl_is_named(tmp_path: Path, line: str, cause: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2: ") as raised:
        text_prompts(path, 2, output_len=1)
    assert cause in str(raised.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\n", b" \n\n"])
def test_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"prompts\.txt"):
        text_prompts(path, 1, output_len=1)


def test_prefixes_are_shared_and_come_on_top() -> None:
    lengths = RandomLengths(input_len=4, output_len=1, prefix_len=6, num_prefixes=3)
    prompts = random_prompts(60, lengths, range(1000), seed=1)
    contents = [prompt.content for prompt in prompts if isinstance(prompt.content, list)]
    assert lengths.most == 11
    assert all(prompt.num_tokens == len(prompt.content) == 10 for prompt in prompts)
    assert len({tuple(content[:6]) for content in contents}) == 3
    assert len({tuple(content[6:]) for content in contents}) == 60
    plain = random_prompts(60, RandomLengths(input_len=4, output_len=1), range(1000), seed=1)
    assert [content[6:] for content in contents] == [prompt.content for prompt in plain]
