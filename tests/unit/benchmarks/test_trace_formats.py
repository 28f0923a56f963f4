"""What the two formats say, and that no line of nonsense gets past."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.benchmarks.trace_formats import detect_format, read_requests
from llmserve.errors import DataError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 23:59:59.5000000,374,44\r\n"
    "2023-11-17 00:00:01.2500000,91,16"  # no end of line at the end, as in the original
)


def row(**changes: object) -> str:
    values = {"timestamp": 0, "input_length": 513, "output_length": 2, "hash_ids": [4, 5]}
    return json.dumps({**values, **changes})


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace"
    path.write_bytes("\n".join(lines).encode())
    return path


def test_azure_lines_are_read_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE)
    assert detect_format(path) == "azure"
    first, second = read_requests(path, "azure")
    assert (first.arrival_s, first.input_len, first.output_len) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(1.75)
    assert (second.line, second.input_len, second.output_len) == (3, 91, 16)
    assert first.block_keys is None


def test_mooncake_lines_are_read_as_they_are(tmp_path: Path) -> None:
    later = row(timestamp=2500, priority=-3, tenant="b", extra=[1], hash_ids=[4, 7])
    path = write(tmp_path, row(timestamp=1000), "", later)
    assert detect_format(path) == "mooncake"
    first, second = read_requests(path, "mooncake")
    assert (first.arrival_s, first.input_len, first.output_len) == (0.0, 513, 2)
    assert (first.block_keys, first.priority, first.tenant) == ([4, 5], None, None)
    assert (second.line, second.arrival_s) == (3, 1.5)
    assert (second.block_keys, second.priority, second.tenant) == ([4, 7], -3, "b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2023-11-16 18:15:46,1", "three cells"),
        ("2023-11-16 18:15:46,1,2,3", "three cells"),
        ("yesterday,1,2", "a time like"),
        ("2023-11-16 18:15:46,0,2", "ContextTokens must be a whole number of at least 1"),
        ("2023-11-16 18:15:46,1,-2", "GeneratedTokens"),
        ("2023-11-16 18:15:46,1.5,2", "ContextTokens"),
        ("2023-11-16 18:15:46,1,", "GeneratedTokens"),
        ("2023-11-16 18:15:45,1,2", "sort the trace"),
    ],
)
def test_bad_azure_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = "2023-11-16 18:15:46,1,2"
    path = write(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", good, line)
    requests = read_requests(path, "azure")
    assert next(requests).line == 2  # the lines before it are given out first
    with pytest.raises(DataError, match=message) as caught:
        next(requests)
    assert f"{path}, line 3: " in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "JSON object"),
        ('{"timestamp": 1, "input_length": 1}', "lacks hash_ids, output_length"),
        (row(timestamp="1"), "timestamp must be a number"),
        (row(timestamp=True), "timestamp must be a number"),
        (row(timestamp=1e999), "is not JSON: number is infinity"),
        (row(timestamp=-1), "sort the trace"),
        (row(input_length=0), "input_length must be a whole number of at least 1"),
        (row(input_length=512.0), "input_length"),
        (row(output_length=0), "output_length"),
        (row(output_length=True), "output_length"),
        (row(hash_ids=[4]), "the prompt's 2 blocks of 512"),
        (row(hash_ids=[4, 5, 6]), "the prompt's 2 blocks of 512"),
        (row(hash_ids="45"), "the prompt's 2 blocks of 512"),
        (row(hash_ids=[4, -1]), "hash_ids must be a whole number of at least 0"),
        (row(hash_ids=[4, 2**63]), "hash_ids"),
        (row(priority="high"), "priority"),
        (row(tenant=3), "tenant must be a string"),
    ],
)
def test_bad_mooncake_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, row(), line.replace("Infinity", "1e999"))
    with pytest.raises(DataError, match=message) as caught:
        list(read_requests(path, "mooncake"))
    assert f"{path}, line 2: " in str(caught.value)


@pytest.mark.parametrize("content", ["", "time,in,out\n1,2,3", "TIMESTAMP"])
def test_file_that_begins_like_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="line 1: a trace begins with TIMESTAMP"):
        detect_format(write(tmp_path, content))


def test_format_given_is_held_to(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: an azure trace begins with"):
        list(read_requests(write(tmp_path, row()), "azure"))
    with pytest.raises(DataError, match="line 1"):
        list(read_requests(write(tmp_path, AZURE), "mooncake"))


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the trace"):
        detect_format(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read the trace"):
        detect_format(tmp_path / "bytes")
