from __future__ import annotations

import asyncio

from llmserve.server.visitors import Visitors


def test_an_era_is_over_when_all_who_came_in_it_have_left() -> None:
    async def main() -> None:
        visitors, happened = Visitors(), []
        leave = [asyncio.Event() for _ in range(3)]

        async def visit(index: int) -> None:
            with visitors.inside():
                await leave[index].wait()
            happened.append(index)

        visits = [asyncio.create_task(visit(index)) for index in (0, 1)]
        await asyncio.sleep(0)
        era = visitors.begin_era()
        visits.append(asyncio.create_task(visit(2)))
        await asyncio.sleep(0)

        async def wait() -> None:
            await visitors.wait_left(era)
            happened.append("over")  # type: ignore[arg-type]

        waiting = asyncio.create_task(wait())
        for index in (1, 0):
            leave[index].set()
            await visits[index]
        await waiting
        assert happened == [1, 0, "over"], "who came later is not waited for"
        await visitors.wait_left(era)
        leave[2].set()
        await visits[2]

    asyncio.run(main())
