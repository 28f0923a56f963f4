"""Named places where a test makes the program fail, so that recovery is tested and not hoped for.

`LLMSERVE_FAILPOINTS` arms them when the process starts, and nothing else can: no option, no
route. It holds `name=action` or `name=action@n`, separated by commas:

    ckpt.write=raise         every hit of `ckpt.write` raises FailpointError
    durable.op=enospc@7      the 7th hit of `durable.op` fails as on a full disk
    engine.forward=kill@3    the 3rd hit of `engine.forward` ends the process by SIGKILL
    engine.poison=abort      every hit of `engine.poison` ends the process by SIGABRT, as a defect
    engine.poison=hang       every hit of `engine.poison` never returns

The idea is etcd's gofail and SQLite's I/O-error tests. Unarmed, a hit costs one look at an empty
dictionary. What is armed is logged as a warning, when it is armed and when it fires.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import time
from dataclasses import dataclass

from .errors import ConfigError, LLMServeError

__all__ = ["VARIABLE", "FailpointError", "arm", "disarm_all", "hit", "is_armed"]

VARIABLE = "LLMSERVE_FAILPOINTS"
"""The environment variable that arms failpoints."""

_SPEC = re.compile(r"([a-z_.]+)=(raise|enospc|kill|abort|hang)(?:@([1-9][0-9]{0,8}))?", re.ASCII)
_log = logging.getLogger("llmserve")


class FailpointError(LLMServeError):
    """The failure that an armed failpoint was asked for."""


@dataclass(slots=True)
class _Point:
    action: str
    turn: int | None
    """Which hit fires, counted from 1; None: every one."""
    hits: int = 0


_armed: dict[str, _Point] = {}


def arm(spec: str) -> None:
    """Arm the failpoints of `spec`, in the form of the environment variable.

    Raises:
        ConfigError: `spec` is not in that form.
    """
    for part in filter(None, (part.strip() for part in spec.split(","))):
        match = _SPEC.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"failpoint {part!r} is not name=raise, name=enospc, name=kill, name=abort or "
                "name=hang, each with @n for the n-th hit alone"
            )
        name, action, turn = match.groups()
        _armed[name] = _Point(action, int(turn) if turn else None)
        _log.warning("failpoint armed: %s", part)


def disarm_all() -> None:
    """Disarm every failpoint."""
    _armed.clear()


def is_armed(name: str) -> bool:
    """Whether a hit of `name` would be counted."""
    return name in _armed


def hit(name: str) -> None:
    """Pass the place called `name`: nothing happens unless it is armed and its turn has come.

    Raises:
        FailpointError: armed with `raise`.
        OSError: armed with `enospc`; its errno is ENOSPC.
    """
    if not _armed:
        return
    point = _armed.get(name)
    if point is None:
        return
    point.hits += 1
    if point.turn is None or point.hits == point.turn:
        _fire(name, point)


def _fire(name: str, point: _Point) -> None:
    _log.warning("failpoint %s fires: %s at hit %d", name, point.action, point.hits)
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if point.action == "abort":
        os.abort()
    while point.action == "hang":
        time.sleep(60)
    if point.action == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (failpoint {name})")
    raise FailpointError(f"failpoint {name} fired at hit {point.hits}")


arm(os.environ.get(VARIABLE, ""))
