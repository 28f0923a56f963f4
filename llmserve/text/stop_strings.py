"""Finding stop strings in a text that arrives in pieces, without ever showing part of one.

An automaton over all stop strings at once (Aho and Corasick, "Efficient string matching", CACM
18(6), 1975) is advanced by one step per character, however many strings there are. Its state is the
longest end of the text that begins a stop string: exactly what must be held back.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache

__all__ = ["StopScanner"]


class StopScanner:
    """One text, scanned as it comes.

    Of several stop strings the one that is complete first ends the text; of those complete at the
    same character, the longest. The outcome does not depend on how the text was split.
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._automaton = _build(stops)
        self._include_stop = include_stop
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            The text that may be shown now, and the stop string that was found. After one was
            found the scanner is done with.
        """
        automaton, state = self._automaton, self._state
        if state == 0 and automaton.starts.isdisjoint(text):
            return text, None
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            state = automaton.step(state, char)
            stop = automaton.found[state]
            if stop is not None:
                return pending[: position if self._include_stop else position - len(stop)], stop
        self._state = state
        shown = len(pending) - automaton.depth[state]
        self._held = pending[shown:]
        return pending[:shown], None

    def flush(self) -> str:
        """The text held back, at the end."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """States are the beginnings of the stop strings, numbered; 0 is the empty one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.starts = frozenset(stop[0] for stop in stops)
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the longest proper end of the state that is a state, too
        self.depth = [0]
        self.found: list[str | None] = [None]  # the longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after `char`."""
        while char not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][char]

    def _add(self, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, start=1):
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(depth)
                self.found.append(None)
            state = self._next[state][char]
        self.found[state] = stop

    def _link(self) -> None:
        """Set the fallbacks, shorter states first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                if self.found[child] is None:
                    self.found[child] = self.found[self._fallback[child]]
                queue.append(child)


@lru_cache(maxsize=64)  # the choices of a request, and requests of one client, share them
def _build(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)
