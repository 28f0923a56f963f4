"""The environment in which templates of strangers run: what they can reach, and how large it gets.

Jinja's immutable sandbox keeps a template away from the interpreter but is no limit on resources:
`'a' * 300000000` renders, nested loops run for days, a list that holds itself twice, thirty times
over, prints as gigabytes. Here every value is bounded when it is made (by operators, `~`, literals,
calls, filters, captured output), so that no single operation takes long, and every loop, call and
operator looks at the clock. Filters and string methods that only pad or draw lots are absent.

Otherwise it is the environment in which `transformers` renders chat templates: the same options,
`tojson`, `raise_exception`, `strftime_now`, loop controls and `generation` tag.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, TypeVar

from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .sandbox_compiler import BoundedCodeGenerator, GenerationTag

__all__ = ["BoundError", "RefusalError", "Sandbox"]

T = TypeVar("T")

# Filters by name, those of them apart that need more than a look at their result.
_PLAIN_FILTERS = frozenset(
    {"abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"}
    | {"int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"}
    | {"rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim"}
    | {"truncate", "unique", "upper"}
)
_REFUSED_STR_METHODS = frozenset(
    {"center", "encode", "expandtabs", "ljust", "rjust", "translate", "zfill"}
)
_MAX_INT_BITS = 4096
_MAX_INDENT = 32
_MAX_FORMAT_CHARS = 256
_WIDE_FIELD = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # %9999d, %*d, {:9999}, {:{width}}


class BoundError(TemplateRuntimeError):
    """The template went beyond a bound."""


class RefusalError(TemplateRuntimeError):
    """The template called `raise_exception`."""


class _Clock(threading.local):
    deadline: float = 0.0  # before a rendering, past: jinja computes no filter while compiling


class _Namespace(Namespace):
    """Does not print what it holds: other namespaces, which hold others, and so on."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Buffer(list[str]):
    """Output that a template captures, bounded like any other value."""

    def __init__(self, check_size: Callable[[int], None]) -> None:
        super().__init__()
        self._check_size = check_size
        self._size = 0

    def append(self, piece: str) -> None:
        self._size += len(piece) + 1
        self._check_size(self._size)
        super().append(piece)

    def extend(self, pieces: Iterable[str]) -> None:
        for piece in pieces:
            self.append(piece)


class Sandbox(ImmutableSandboxedEnvironment):
    """The bounded environment. Threads may render in it at the same time.

    Args:
        max_size: Bound on each value: characters and members of containers, all levels together.
        now: The clock that templates read through `strftime_now`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = BoundedCodeGenerator

    def __init__(self, *, max_size: int, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationTag],
        )
        self._max_size = max_size
        self._now = now
        self._clock = _Clock()
        self.filters = {name: self._bounded(FILTERS[name]) for name in _PLAIN_FILTERS} | {
            "format": self._bounded(FILTERS["format"], self._check_format_filter),
            "indent": self._bounded(FILTERS["indent"], _check_indent),
            "join": self._bounded(FILTERS["join"], self._measure_join),
            "replace": self._bounded(FILTERS["replace"], self._check_replace),
            "sum": self._bounded(FILTERS["sum"], _check_sum),
            "tojson": self._to_json,
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now

    def start_clock(self, timeout_s: float) -> None:
        """Give the rendering that begins now, in this thread, its time."""
        self._clock.deadline = time.monotonic() + timeout_s

    def tick(self) -> None:
        """Raise `BoundError` if the rendering has had its time."""
        if time.monotonic() > self._clock.deadline:
            raise BoundError("it takes too long")

    def check_size(self, size: int) -> None:
        """Raise `BoundError` for a value that is, or would be, too large."""
        if size > self._max_size:
            raise BoundError("it makes a value that is too large")

    def check(self, value: T) -> T:
        """Return `value` if all that it holds, counted as often as it is held, is in bounds."""
        size, rest = 0, [value]
        while rest:
            item = rest.pop()
            size += 1
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, dict | list | tuple | set | frozenset):
                rest += [*item, *item.values()] if isinstance(item, dict) else item
                self.tick()
            self.check_size(size + len(rest))
        return value

    def open_buffer(self) -> list[str]:
        """A place for captured output."""
        return _Buffer(self.check_size)

    def join_texts(self, parts: Iterable[object]) -> str:
        """The value of `a ~ b`."""
        texts = [str(part) for part in parts]
        self.check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Bound the operators whose result can be larger than what they are given."""
        self.tick()
        if operator == "+":
            self.check_size(_len(left) + _len(right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        return self.check(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Bound what functions, macros and methods return."""
        self.tick()
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", None)
        if isinstance(text, str) and name == "replace":
            self._check_replace(text, *args)
        elif isinstance(text, str) and name == "join":
            args = self._measure_join(*args, text)[:1]
        return self.check(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse the methods of strings that only pad."""
        if isinstance(obj, str) and attr in _REFUSED_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Let `str.format` fill in a little, not a lot."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def format_bounded(*args: Any, **kwargs: Any) -> str:
            self._check_format(text, (args, kwargs))
            return wrapped(*args, **kwargs)

        return format_bounded

    def _bounded(
        self, function: Callable[..., Any], guard: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A filter that looks at the clock and at its result.

        `guard` sees the arguments first; where it returns a tuple, that takes their place.
        """
        num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, put first

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if guard is not None:
                given = args[num_passed:]
                args = (*args[:num_passed], *(guard(*given, **kwargs) or given))
            return self.check(function(*args, **kwargs))

        return call

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(max(left.bit_length(), right.bit_length()))
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int):
                self.check_size(_len(value) * times)

    def _check_replace(
        self, value: object, old: object = "", new: object = "", count: int | None = None
    ) -> None:
        text = str(value)
        times = text.count(str(old))
        if count is not None and count >= 0:
            times = min(times, count)
        self.check_size(len(text) + times * len(str(new)))

    def _check_format(self, text: str, values: object) -> None:
        """Each field may fill in all of `values`; none may pad by much."""
        if _WIDE_FIELD.search(text):
            raise BoundError("a format has a field of 1000 characters or more, or of any width")
        num_fields = text.count("%") + text.count("{")
        self.check_size(len(text) + num_fields * len(str(self.check(values))))

    def _check_format_filter(self, text: object, *args: object, **kwargs: object) -> None:
        self._check_format(str(text), (args, kwargs))

    def _measure_join(
        self, values: Iterable[object] = (), d: str = "", *rest: object, **_: object
    ) -> tuple[object, ...]:
        """The arguments of `join` with the values in a list that is in bounds when joined."""
        listed = list(values)
        self.check_size(len(listed) * len(str(d)))
        return self.check(listed), d, *rest

    def _to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Like the filter of `transformers`: no escapes for HTML, and the options of `json`."""
        _check_indent(value, indent or 0)
        if any(len(separator) > _MAX_INDENT for separator in separators or ()):
            raise BoundError(f"tojson: a separator has more than {_MAX_INDENT} characters")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        buffer = self.open_buffer()
        buffer.extend(encoder.iterencode(value))
        return "".join(buffer)

    def _strftime_now(self, format: str) -> str:
        if len(format) > _MAX_FORMAT_CHARS:
            raise BoundError(f"strftime_now: a format has more than {_MAX_FORMAT_CHARS} characters")
        return self._now().strftime(format)


def _raise_exception(message: object) -> NoReturn:
    raise RefusalError(str(message))


def _check_indent(_text: object, width: int | str = 4, *_args: object, **_kwargs: object) -> None:
    if (len(width) if isinstance(width, str) else int(width)) > _MAX_INDENT:
        raise BoundError(f"an indentation is wider than {_MAX_INDENT}")


def _check_sum(_values: object, _attribute: object = None, start: object = 0) -> None:
    if not isinstance(start, int | float):
        raise BoundError("sum: start must be a number")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(0, right))


def _check_bits(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        raise BoundError("it makes a number that is too large")


def _len(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0
