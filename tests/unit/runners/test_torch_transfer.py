"""Arrays on their way to a device and back: whatever their types and sizes, they arrive."""

from __future__ import annotations

import numpy as np
import torch

from llmserve.runners.torch_transfer import Download, Parcel, num_words, packed, unpack, upload

CPU = torch.device("cpu")
ARRAYS = [
    np.array([3, -(2**62)]),
    np.array([[1.5, -np.inf], [np.nan, 5e-324]]),
    np.array([[1, 2**32 - 1, 2**31]], dtype=np.uint32),
    np.empty((0, 2), dtype=np.int64),
    np.array([True, False, True]),
    np.arange(12).reshape(3, 4)[:, ::2],
]


def test_packed_arrays_are_read_where_they_were_written() -> None:
    words = packed(ARRAYS, CPU)
    assert len(words) == num_words(ARRAYS) == 2 + 4 + 2 + 0 + 1 + 6
    for found, array in zip(unpack(words, ARRAYS), ARRAYS, strict=True):
        bits = array.view(np.int32) if array.dtype == np.uint32 else array
        np.testing.assert_array_equal(found.numpy(), bits)
        assert found.shape == array.shape


def test_host_and_packed_arrays_have_the_same_types() -> None:
    words = packed(ARRAYS, CPU)
    for one, two in zip(unpack(words, ARRAYS), upload(ARRAYS, CPU), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_parcel_gives_each_its_own() -> None:
    parcel = Parcel()
    ids, values = parcel.add([5, 6]), parcel.add([[0.25]], np.float64)
    parcel.send(CPU)
    assert ids.there.tolist() == [5, 6]
    assert values.there.tolist() == [[0.25]]
    Parcel().send(CPU)  # of nothing


def test_download_brings_back_whole_numbers_and_floats() -> None:
    tensors = [torch.tensor([[1, -5]]), torch.tensor([0.1, torch.nan]).double(), torch.empty(0, 3)]
    arrays = Download([tensor if tensor.numel() else tensor.double() for tensor in tensors]).wait()
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
    assert Download([]).wait() == []
