from __future__ import annotations

import random

from llmserve.server.shared_ranges import SharedRanges


def test_ranges_never_overlap_and_all_comes_together_again() -> None:
    choose = random.Random(0)
    ranges, taken = SharedRanges(1000), dict[int, int]()
    num_refused = 0
    for _ in range(2000):
        if taken and choose.random() < 0.45:
            start = choose.choice(list(taken))
            ranges.give_back(start, taken.pop(start))
            continue
        size = choose.randint(1, 150)
        start = ranges.take(size)
        if start is None:
            num_refused += 1
            continue
        assert 0 <= start <= 1000 - size
        assert all(start + size <= one or one + taken[one] <= start for one in taken)
        taken[start] = size
    assert num_refused
    for start, size in taken.items():
        ranges.give_back(start, size)
    assert ranges.take(1000) == 0


def test_no_memory_holds_nothing() -> None:
    assert SharedRanges(0).take(1) is None
