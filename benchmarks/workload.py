"""What is sent: prompts of exact length from random token ids, or texts from a file.

Random prompts go out as lists of ids where the server takes them, which makes their length exact
whatever the tokenizer. Where it takes only text, random ids are turned into text by the server's
own `/detokenize` and cut or filled until its `/tokenize` counts the length that was asked.

Every prompt is drawn anew, and a server with a prefix cache gains nothing from earlier ones, unless
a shared prefix is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson

from llmserve.errors import ConfigError, DataError

__all__ = [
    "Message",
    "Prompt",
    "RandomLengths",
    "RemoteTokenizer",
    "align_to_text",
    "random_prompts",
    "sample_ids",
    "text_prompts",
]

ALIGN_ROUNDS = 8

Message = dict[str, str]
"""`role` and `content`."""

# Ordinary words, tokenized by a server that does not tell its vocabulary's size: the ids that come
# back are known to be valid and to turn into whole characters.
SAMPLE_TEXT = (
    "The river rose in the night and by morning the lower road was gone. People carried chairs, "
    "lamps and sacks of flour up the hill, counted their children twice, and waited under the old "
    "chapel roof. A boy with a red cap asked when it would end; nobody answered, because the only "
    "man who knew how water behaves had left in spring to build bridges somewhere else. Toward "
    "evening the rain thinned, frogs began to call, and seven boats came out of the grey light."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request to send."""

    index: int
    """Its place in the workload."""
    content: str | list[int]
    """Text, or token ids for the completions route."""
    num_tokens: int | None
    """Length of `content` in the server's tokens, where it is known."""
    output_len: int
    """Most tokens to generate; the number of them where end tokens are ignored."""
    history: tuple[Message, ...] = ()
    """What was said before, for the chat route."""
    turn: int = 0
    """Its place in its conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Lengths of random prompts and answers, in tokens."""

    input_len: int = 128
    """Mean tokens of a prompt."""
    output_len: int = 128
    """Mean tokens of an answer."""
    range_ratio: float = 0.0
    """Half width r of the range: lengths are uniform in mean * (1 - r) .. mean * (1 + r)."""
    prefix_len: int = 0
    """Tokens before each prompt that it shares with others; on top of `input_len`."""
    num_prefixes: int = 1
    """Different prefixes; each prompt takes one at random."""

    def __post_init__(self) -> None:
        if self.input_len < 1 or self.output_len < 1:
            raise ConfigError(
                f"lengths must be at least 1 token, got {self.input_len} in, {self.output_len} out"
            )
        if self.prefix_len < 0 or self.num_prefixes < 1:
            raise ConfigError(
                f"there must be at least 1 prefix of at least 0 tokens, got {self.num_prefixes} of "
                f"{self.prefix_len}"
            )
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"the range ratio must be in [0, 1), got {self.range_ratio:g}")

    @property
    def most(self) -> int:
        """Tokens of the longest prompt, its prefix included, and the longest answer together."""
        return self.prefix_len + self._range(self.input_len)[1] + self._range(self.output_len)[1]

    def draw(self, rng: np.random.Generator, num_prompts: int) -> list[tuple[int, int]]:
        """(prompt, answer) lengths of `num_prompts` requests."""
        low, high = zip(self._range(self.input_len), self._range(self.output_len), strict=True)
        pairs = rng.integers(low, high, size=(num_prompts, 2), endpoint=True)
        return [(input_len, output_len) for input_len, output_len in pairs.tolist()]

    def _range(self, mean: int) -> tuple[int, int]:
        low, high = mean * (1 - self.range_ratio), mean * (1 + self.range_ratio)
        return max(1, math.floor(low)), math.ceil(high)


class RemoteTokenizer(Protocol):
    """The tokenizer of the server under test."""

    async def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, no special ones added."""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""


def random_prompts(
    num_prompts: int, lengths: RandomLengths, ids: Sequence[int], *, seed: int
) -> list[Prompt]:
    """`num_prompts` prompts of ids drawn uniformly from `ids` (a range, or a pool of known ones).

    The same arguments give the same prompts, and fewer of them the same first ones.
    """
    seeds = np.random.SeedSequence(seed).spawn(3)
    length_rng, id_rng, prefix_rng = (np.random.default_rng(one) for one in seeds)
    pool = np.asarray(ids, dtype=np.int64)
    prefixes = prefix_rng.choice(pool, size=(lengths.num_prefixes, lengths.prefix_len)).tolist()
    return [
        Prompt(
            index=index,
            content=prefixes[prefix_rng.integers(len(prefixes))]
            + id_rng.choice(pool, size=input_len).tolist(),
            num_tokens=lengths.prefix_len + input_len,
            output_len=output_len,
        )
        for index, (input_len, output_len) in enumerate(lengths.draw(length_rng, num_prompts))
    ]


async def sample_ids(tokenizer: RemoteTokenizer) -> list[int]:
    """Distinct ids that the server's tokenizer gives an English text, ascending."""
    return sorted(set(await tokenizer.tokenize(SAMPLE_TEXT)))


async def align_to_text(prompt: Prompt, tokenizer: RemoteTokenizer) -> Prompt:
    """`prompt`, made of ids, as text that the server counts as just as many tokens.

    Turning ids into text and back merges some of them. So the text is cut, or filled with the ids
    at the prompt's start, until the count is right; after a few rounds the nearest text found is
    taken, and `num_tokens` says what the server counts.
    """
    ids = wanted_ids = list(prompt.content) if isinstance(prompt.content, list) else []
    wanted = len(wanted_ids)
    best = replace(prompt, content="", num_tokens=0)
    for _ in range(ALIGN_ROUNDS):
        text = await tokenizer.detokenize(ids)
        ids = await tokenizer.tokenize(text)
        if abs(len(ids) - wanted) < abs((best.num_tokens or 0) - wanted):
            best = replace(prompt, content=text, num_tokens=len(ids))
        if len(ids) == wanted:
            break
        ids = ids[:wanted] + wanted_ids[: max(0, wanted - len(ids))]
    return best


def text_prompts(path: Path, num_prompts: int, *, output_len: int) -> list[Prompt]:
    """Prompts of a file in its order, from the start again where it holds too few.

    A `.jsonl` file holds one object with `prompt`, and optionally `output_len`, on each line; any
    other file is text with one prompt on each line. Blank lines are skipped.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a line is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts in {path}: {error}") from error
    rows = list(_rows(path, lines, output_len))
    if not rows:
        raise DataError(f"{path} holds no prompt: it needs at least one line that is not blank")
    return [
        Prompt(index=index, content=text, num_tokens=None, output_len=length)
        for index, (text, length) in enumerate(islice(cycle(rows), num_prompts))
    ]


def _rows(path: Path, lines: Sequence[str], output_len: int) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line, output_len
            continue
        try:
            yield _json_row(line, output_len)
        except (orjson.JSONDecodeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error


def _json_row(line: str, output_len: int) -> tuple[str, int]:
    row = orjson.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise ValueError('expected an object with a non-empty string "prompt"')
    length = row.get("output_len", output_len)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f'"output_len" must be a whole number of tokens above 0, got {length!r}')
    return row["prompt"], length
