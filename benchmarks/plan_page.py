"""What plans predicted beside what a server then did: one table of their documents, and how far
they were off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .machine import date_and_machine

__all__ = ["plan_markdown"]

Document = Mapping[str, Any]
"""What `llmserve plan --check` prints as its last line."""


def plan_markdown(documents: Sequence[Document]) -> str:
    """The table, a row for each prediction, and what its misses come to."""
    rates = [miss for one in documents if (miss := one["knee_miss"]) is not None]
    loops = [loop["miss"] for one in documents for loop in one["loops"]]
    lines = [
        f"{date_and_machine(documents[0])}; server and client on the same cores.",
        "",
        "| model | most sequences | in / out | load | predicted | measured | miss |",
        "|---|---|---|---|---|---|---|",
        *(row for one in documents for row in _rows(one)),
        "",
        f"**Highest rates, {len(rates)} settings**: {_misses(rates)}. "
        f"Closed loops, {len(loops)}: {_misses(loops)}. All together: {_misses(rates + loops)}.",
        "",
        f"    {documents[0]['command']}",
    ]
    return "\n".join(lines) + "\n"


def _rows(document: Document) -> Iterator[str]:
    setting = (
        f"| {document['model']} | {document['max_num_seqs']} "
        f"| {document['input_len']} / {document['output_len']}"
    )
    for loop in document["loops"]:
        predicted, measured = (
            loop[side]["output_throughput"] for side in ("predicted", "measured")
        )
        yield (
            f"{setting} | {loop['max_concurrency']} at a time | {predicted:,.0f} tokens/s "
            f"| {measured:,.0f} | {loop['miss']:+.1%} |"
        )
    if document["knee_miss"] is not None:
        predicted, measured = (document[name]["rate"] for name in ("knee", "measured_knee"))
        yield (
            f"{setting} | highest rate in time | {predicted:.3g} requests/s | {measured:.3g} "
            f"| {document['knee_miss']:+.1%} |"
        )


def _misses(misses: Sequence[float]) -> str:
    sizes = np.abs(misses)
    too_high = sum(miss > 0 for miss in misses)
    return (
        f"off by {np.median(sizes):.1%} in the median, {sizes.max():.1%} at most, "
        f"{too_high} of {len(sizes)} too high"
    )
