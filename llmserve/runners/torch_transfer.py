"""Copies between host and device that the host does not wait for.

A step's arrays go to the device in one copy from pinned memory, and what it brought comes back in
one: a copy of ordinary memory would make the host wait for everything that the device still does.
Where the device is the host itself nothing is copied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Download", "Parcel", "Sent", "num_words", "packed", "unpack", "upload"]

_WORD = 8
"""Bytes to which every array is filled up, so that each can be read as any type."""
_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.uint32): torch.int32,
    np.dtype(np.bool_): torch.bool,
}
"""Types of numpy that can be sent, and what they are there; masks keep their bits."""


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """All arrays (int64, float64, uint32 or bool) in one copy, each as a tensor of its shape.

    On a CPU the tensors are the arrays' own memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(_readable(array)) for array in arrays]
    return unpack(packed(arrays, device).to(device, non_blocking=True), arrays)


def num_words(arrays: Sequence[npt.NDArray[Any]]) -> int:
    """Words of 8 bytes that the arrays take, each beginning with one."""
    return sum(map(_num_words, arrays))


def packed(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> Tensor:
    """The arrays one after another, int64 [words] on the host, where `device` can fetch them."""
    count = num_words(arrays)
    if device.type == "cuda":
        words = torch.empty(count, dtype=torch.int64, pin_memory=True)
        memory = words.numpy()
    else:
        memory = np.empty(count, dtype=np.int64)
        words = torch.from_numpy(memory)
    raw, start = memory.view(np.uint8), 0
    for array in arrays:
        values = _readable(array).reshape(-1).view(np.uint8)
        raw[start : start + len(values)] = values
        start += _num_words(array) * _WORD
    return words


def unpack(words: Tensor, arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
    """What `packed` wrote into `words`, wherever they are now: views of them."""
    parts = torch.split(words, [_num_words(array) for array in arrays])
    return [
        part.view(_DTYPES[array.dtype])[: array.size].view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


def _num_words(array: npt.NDArray[Any]) -> int:
    return -(-array.nbytes // _WORD)


def _readable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in one piece, of a type that torch has operations for."""
    whole = np.ascontiguousarray(array)
    return whole.view(np.int32) if whole.dtype == np.uint32 else whole


class Sent:
    """An array of a parcel; `there` is the tensor, once the parcel was sent."""

    __slots__ = ("there",)
    there: Tensor


class Parcel:
    """Arrays of one step, collected by whoever needs them and sent together."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self._sent: list[Sent] = []

    def add(self, values: npt.ArrayLike, dtype: type[np.generic] = np.int64) -> Sent:
        """Put in `values` as an array of that type (see `upload`)."""
        sent = Sent()
        self._arrays.append(np.asarray(values, dtype=dtype))
        self._sent.append(sent)
        return sent

    def send(self, device: torch.device) -> None:
        """Give every array its tensor on `device`. An empty parcel costs nothing."""
        if self._arrays:
            for sent, tensor in zip(self._sent, upload(self._arrays, device), strict=True):
                sent.there = tensor


class Download:
    """Tensors on their way to the host, in one copy that is waited for when they are read."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy; each tensor is int64 or float64."""
        self._shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        words = [tensor.reshape(-1).view(torch.int64) for tensor in tensors]
        self._words = torch.cat(words) if words else torch.empty(0, dtype=torch.int64)
        self._event: torch.cuda.Event | None = None
        if self._words.device.type == "cuda":
            there = self._words
            self._words = torch.empty(there.shape, dtype=torch.int64, pin_memory=True)
            self._words.copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(there.device))

    def wait(self) -> list[npt.NDArray[Any]]:
        """The arrays, in their order. An error of the device since its last one surfaces here."""
        if self._event is not None:
            self._event.synchronize()
        sizes = [shape.numel() for shape, _ in self._shapes]
        parts = torch.split(self._words, sizes)
        return [
            part.view(dtype).view(shape).numpy()
            for part, (shape, dtype) in zip(parts, self._shapes, strict=True)
        ]
