"""Operations that would make the host wait for a device, found on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["never_waiting"]

_WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
}
"""Operations whose result, or whose shape, the host must know."""
_WAITING_METHODS = (
    "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist",
)  # fmt: skip
"""Methods that read a CPU's tensor without an operation that could be watched."""


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raise AssertionError where a value of a tensor is asked for."""

    def refuse(name: str) -> Callable[..., Any]:
        def method(*_: object, **__: object) -> None:
            raise AssertionError(f"the host waits in Tensor.{name}")

        return method

    methods = [patch.object(Tensor, name, refuse(name)) for name in _WAITING_METHODS]
    with _Watched():
        for method in methods:
            method.start()
        try:
            yield
        finally:
            for method in methods:
                method.stop()


class _Watched(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _WAITING, f"the host waits in {name}"
        if name in ("index", "index_put", "index_put_"):
            kinds = [each.dtype for each in args[1] if each is not None]
            assert torch.bool not in kinds, f"the host waits in {name} by a mask"
        return func(*args, **(kwargs or {}))
