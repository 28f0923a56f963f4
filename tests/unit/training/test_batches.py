"""The order of windows: complete, shuffled, and a function of the position alone."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.errors import DataError
from llmserve.training.batches import WindowOrder, read_windows


def test_one_pass_visits_every_window_once() -> None:
    order = WindowOrder(1003, context=10, seed=3)
    starts = order.starts(0, order.windows_per_epoch)
    assert len({start // 10 for start in starts}) == len(starts) == order.windows_per_epoch
    assert len({start % 10 for start in starts}) == 1
    assert starts != sorted(starts)


def test_windows_stay_inside_the_text_in_every_pass() -> None:
    for num_tokens in range(21, 60):
        order = WindowOrder(num_tokens, context=10, seed=0)
        starts = order.starts(0, 200)
        assert min(starts) >= 0
        assert max(starts) + 11 <= num_tokens


def test_resumed_order_equals_the_uninterrupted_one() -> None:
    whole = WindowOrder(500, context=7, seed=1).starts(0, 300)
    for position in (0, 1, 69, 70, 71, 299):
        later = WindowOrder(500, context=7, seed=1)
        assert later.starts(position, 300 - position) == whole[position:]


def test_passes_and_seeds_differ() -> None:
    order = WindowOrder(500, context=7, seed=1)
    count = order.windows_per_epoch
    assert order.starts(0, count) != order.starts(count, count)
    assert order.starts(0, count) != WindowOrder(500, context=7, seed=2).starts(0, count)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="needs at least 20"):
        WindowOrder(19, context=10, seed=0)


def test_targets_are_one_token_on() -> None:
    ids = np.arange(100, dtype=np.uint16)
    inputs, targets = read_windows(ids, [3, 50], 4)
    assert inputs.tolist() == [[3, 4, 5, 6], [50, 51, 52, 53]]
    assert targets.tolist() == [[4, 5, 6, 7], [51, 52, 53, 54]]
