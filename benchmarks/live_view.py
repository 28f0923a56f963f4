"""A load test while it runs, on the terminal: how far it is, what is under way, and how fast.

Drawn on the thread that stamps the chunks: so seldom, and only on a terminal.
"""

from __future__ import annotations

import asyncio
import time

from llmserve.console import console, progress

from .load import LoadState

__all__ = ["show_load"]

REFRESH_S = 0.5


async def show_load(state: LoadState, num_requests: int) -> None:
    """Show progress on stderr until cancelled; nothing where stderr is no terminal."""
    if not console().is_terminal:
        return
    bars = progress()
    bars.live.auto_refresh = False
    task = bars.add_task("load", total=num_requests, note="")
    with bars:
        try:
            while True:
                await asyncio.sleep(REFRESH_S)
                bars.update(task, completed=len(state.records), note=note(state), refresh=True)
        finally:
            bars.update(task, completed=len(state.records), note=note(state), refresh=True)


def note(state: LoadState) -> str:
    """What stands behind the bar; short, as 80 columns hold it too."""
    elapsed_s = (state.end_s or time.perf_counter()) - state.start_s
    rate = state.num_tokens / elapsed_s if elapsed_s > 0 else 0.0
    failed = f", {state.num_failed} failed" if state.num_failed else ""
    return f"{state.num_running} open, {rate:.0f} tok/s{failed}"
