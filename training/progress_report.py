"""A run's progress on the terminal: a bar with loss, speed and time left, and lines to keep."""

from __future__ import annotations

from types import TracebackType

from llmserve.console import console, progress

__all__ = ["TerminalReporter"]


class TerminalReporter:
    """A `run_loop.Reporter` on stderr. The bar is drawn on terminals alone; lines always are."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._progress = progress()
        self._progress.disable = is_quiet
        self._task = self._progress.add_task("training", total=None, note="")

    def __enter__(self) -> TerminalReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._is_quiet:
            console().print(text, markup=False, soft_wrap=True)

    def progress(self, step: int, steps: int | None, *, loss: float, tokens_per_s: float) -> None:
        """Move the bar."""
        note = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, total=steps, note=note)
