"""Grammars on their way to the engine: compiled beside its steps, each within a time limit.

A thread compiles while the engine goes on with other requests; llguidance lets go of the
interpreter meanwhile. What was compiled lately is kept, since clients send one schema many times.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from llmserve.engine.grammar import Grammar, Matcher
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.engine.request import Request
from llmserve.errors import LLMServeError, RequestError
from llmserve.failpoints import hit

__all__ = ["GrammarQueue"]

NUM_THREADS = 2
NUM_KEPT = 32
"""Compiled grammars kept for requests to come."""

_log = logging.getLogger("llmserve.engine")


@dataclass(frozen=True, slots=True)
class _Pending:
    request: Request
    compiling: Future[Matcher]
    began: float
    timeout_s: float


class GrammarQueue:
    """Requests whose grammars are being compiled. One thread uses it."""

    def __init__(self, load: Callable[[], GrammarCompiler], *, timeout_s: float) -> None:
        """`load` makes the compiler when the first grammar comes, on a thread of this queue's."""
        self._load = load
        self._timeout_s = timeout_s
        self._compiler: GrammarCompiler | None = None
        self._loading = threading.Lock()
        self._loaded_at = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[_Pending] = []
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()

    @property
    def is_busy(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._pending)

    @property
    def request_ids(self) -> set[str]:
        """Requests that wait for their grammars."""
        return {item.request.request_id for item in self._pending}

    def add(self, request: Request) -> None:
        """Begin to compile the grammar of a request, which has one.

        One that an earlier engine had is not given up: that engine compiled it in time, and now
        those of many may come at once.
        """
        assert request.grammar is not None, "the request has no grammar"
        is_resumed = bool(request.output_token_ids)
        timeout_s = math.inf if is_resumed else self._timeout_s
        began, compiling = time.monotonic(), self._matcher_of(request.grammar)
        self._pending.append(_Pending(request, compiling, began, timeout_s))

    def forget(self, request_id: str) -> None:
        """Drop a request that was aborted."""
        self._pending = [item for item in self._pending if item.request.request_id != request_id]

    def finish(self, request_id: str, choice_index: int) -> None:
        """Drop a choice of a resumed request whose text met a stop string, and it with the last."""
        for item in self._pending:
            if item.request.request_id == request_id:
                item.request.ended_choices.append(choice_index)
                if len(item.request.ended_choices) == item.request.sampling_params.n:
                    self.forget(request_id)
                return

    def wait(self, seconds: float) -> None:
        """Return when a grammar is ready, or after that time."""
        wait([item.compiling for item in self._pending], seconds, "FIRST_COMPLETED")

    def ready(self) -> Iterator[tuple[Request, Matcher | LLMServeError]]:
        """Requests that wait no longer, each with its matcher or with why there is none."""
        now = time.monotonic()
        pending, self._pending = self._pending, []
        for item in pending:
            if item.compiling.done():
                yield item.request, self._outcome(item)
            elif self._is_late(item, now):
                item.compiling.cancel()
                yield item.request, self._too_slow(item.request)
            else:
                self._pending.append(item)

    def _is_late(self, item: _Pending, now: float) -> bool:
        """What it takes to load the compiler is no fault of the grammar that came first."""
        if self._compiler is None:
            return False
        return now - max(item.began, self._loaded_at) >= item.timeout_s

    def close(self) -> None:
        """Wait for no compilation any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _matcher_of(self, grammar: Grammar) -> Future[Matcher]:
        if grammar in self._kept:
            self._kept.move_to_end(grammar)
            done: Future[Matcher] = Future()
            done.set_result(self._kept[grammar])
            return done
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        return self._pool.submit(self._compile, grammar)

    def _compile(self, grammar: Grammar) -> Matcher:
        hit("engine.grammar")
        with self._loading:
            if self._compiler is None:
                compiler = self._load()
                self._loaded_at, self._compiler = time.monotonic(), compiler
        return self._compiler.compile(grammar)

    def _outcome(self, item: _Pending) -> Matcher | LLMServeError:
        error = item.compiling.exception()
        if error is None:
            matcher = item.compiling.result()
            assert item.request.grammar is not None, "a request without a grammar was compiled"
            self._kept[item.request.grammar] = matcher
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
            return matcher
        if isinstance(error, LLMServeError):
            return error
        _log.error("a grammar could not be compiled: %s", type(error).__name__)
        return RequestError("the grammar could not be compiled", param=_param_of(item.request))

    def _too_slow(self, request: Request) -> RequestError:
        return RequestError(
            f"the grammar takes longer than {self._timeout_s:g} s to compile: make it simpler",
            param=_param_of(request),
        )


def _param_of(request: Request) -> str | None:
    return None if request.grammar is None else request.grammar.param
