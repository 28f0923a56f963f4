from __future__ import annotations

import numpy as np
import pytest

from llmserve.engine.block_map import FREE, KEPT, MAX_CELLS, SHARED, BlockMap, draw_map
from llmserve.engine.block_pool import BlockPool
from llmserve.engine.engine import Engine
from support.engines import make_engine, make_request


def cells(picture: BlockMap) -> list[int]:
    return [what for what, count in picture.runs for _ in range(count)]


def by_tables(engine: Engine) -> list[int]:
    """What each block is, read block by block: the oracle."""
    (group,) = engine._scheduler.kv.groups
    holders: dict[int, set[str]] = {}
    order: dict[str, int] = {}
    for sequence in engine._scheduler.running.sequences:
        order.setdefault(sequence.request_id, 3 + len(order))
        for block_id in group.held(sequence.row):
            holders.setdefault(block_id, set()).add(sequence.request_id)
    idle = set(group.pool.idle_blocks())
    found = []
    for block_id in range(group.pool.num_blocks):
        names = holders.get(block_id, set())
        if len(names) > 1:
            found.append(SHARED)
        elif names:
            found.append(order[min(names)])
        else:
            found.append(KEPT if block_id in idle else FREE)
    return found


def test_the_map_says_of_each_block_what_the_tables_say() -> None:
    generator = np.random.default_rng(3)
    engine = make_engine(num_blocks=(64,), max_num_seqs=8)
    seen = set()
    for number in range(24):
        shared = [7] * 16 if number % 2 else []
        prompt = [*shared, *generator.integers(1, 30, 20).tolist()]
        engine.add_request(
            make_request(
                f"r{number}", prompt, n=1 + number % 3, max_tokens=int(generator.integers(2, 30))
            )
        )
        for _ in range(3):
            engine.step(0.0)
            (picture,) = engine.block_maps()
            assert cells(picture) == by_tables(engine)
            seen |= set(cells(picture))
    assert {FREE, KEPT, SHARED, 3} <= seen


@pytest.mark.parametrize("num_blocks", [1, 10, MAX_CELLS, MAX_CELLS + 1, 10 * MAX_CELLS + 3])
def test_no_map_is_told_in_more_cells_than_allowed(num_blocks: int) -> None:
    pool = BlockPool(num_blocks)
    picture = draw_map(pool, [("r", list(range(0, num_blocks, 2)))], None)
    assert len(cells(picture)) == -(-num_blocks // picture.blocks_per_cell) <= MAX_CELLS
    assert picture.owners == ["r"]
    if num_blocks <= MAX_CELLS:
        assert cells(picture) == [3 if index % 2 == 0 else FREE for index in range(num_blocks)]
    else:
        assert set(cells(picture)) == {3}  # of each cell's neighbours one is held
