"""A plain text, however long, in pieces that fit into memory.

A text of up to 4 MiB is one piece. A longer one is cut at the last separator of each 4 MiB; without
separators at the last empty line, or at the last line end where there is none. Where there is
nothing to cut at, a piece grows until there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

__all__ = ["PIECE_BYTES", "read_pieces"]

PIECE_BYTES = 4 << 20


def read_pieces(
    read: Callable[[int], bytes], separator: str, *, piece_bytes: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each piece; a separator that was cut at is in none of them.

    Args:
        read: Gives the next bytes, at most so many; none at the end.
        separator: Text between two documents; empty: there is none.
        piece_bytes: Least bytes at which a cut is looked for; None: `PIECE_BYTES`.
    """
    least = PIECE_BYTES if piece_bytes is None else piece_bytes
    offset, held = 0, b""
    while data := read(max(least, len(held))):
        held += data
        if len(held) < least:
            continue
        end, following = _cut(held, separator)
        if following:
            yield offset, held[:end]
            offset, held = offset + following, held[following:]
    if held or not offset:
        yield offset, held


def _cut(data: bytes, separator: str) -> tuple[int, int]:
    """Where the last whole piece ends, and where the next one begins; 0: there is no such place."""
    if separator:
        marks = {separator.encode(), separator.replace("\n", "\r\n").encode()}
        end, mark = max((data.rfind(mark), mark) for mark in marks)
        return (end, end + len(mark)) if end >= 0 else (0, 0)
    for line_ends in ((b"\n\n", b"\n\r\n"), (b"\n",)):
        start, length = max((data.rfind(line_end), len(line_end)) for line_end in line_ends)
        if start >= 0:
            return start + length, start + length
    return 0, 0
