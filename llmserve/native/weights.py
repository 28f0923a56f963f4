"""A checkpoint's matrices in the kernels' layout, in one piece of memory.

First every matrix is specified: which tensors it joins (query, key and value; gate and input), in
which form it is executed, how many bytes it takes. Then all of them get their places in one
segment and are packed there, several at a time: packing runs in C++ without the interpreter's lock.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..quant.dtypes import StoredArray, to_float32
from .kernels import load_kernels
from .program import Norm, Number, PackedLinear, WeightKind

__all__ = ["Form", "MatrixSpec", "WeightSegment", "number_of", "pad_vector"]

_ALIGNMENT = 64  # bytes: a cache line
_HEAD_GROUP = 32
"""Inputs of one scale of an int4 head made at load."""
_NUMBERS = {
    "float32": Number.FLOAT32,
    "bfloat16": Number.BFLOAT16,
    "float16": Number.FLOAT16,
}
_BITS_PER_WEIGHT = {
    WeightKind.FLOAT32: 32,
    WeightKind.BFLOAT16: 16,
    WeightKind.INT4: 4,
    WeightKind.INT8: 8,
}
_CHUNK_INPUTS = {
    WeightKind.FLOAT32: 1,
    WeightKind.BFLOAT16: 2,
    WeightKind.INT4: 8,
    WeightKind.INT8: 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """In what form a model's matrices are executed."""

    floats: Literal["float32", "bfloat16"]
    """Type of those that the folder does not quantize."""
    has_integer_activations: bool = True
    """Whether integer weights are multiplied with integer activations, else with float32."""
    head: Literal["auto", "int8", "int4", "float"] = "auto"
    """The output layer: as integers made at load, or as it is stored. `auto`: int8 where the
    folder is quantized, else as stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSpec:
    """One matrix of the program: its source, its form and its size."""

    names: tuple[str, ...]
    """Canonical tensors, one behind the other, or gate and input by turns."""
    rows: tuple[int, ...]
    """Outputs of each."""
    width: int
    is_gated: bool
    kind: WeightKind
    group_size: int
    """Inputs of one weight scale, whose products are summed as integers; activations have a scale
    for each too."""
    scale_kind: Number
    has_float_rows: bool
    is_made_here: bool
    """Rounded to integers at load (the head)."""

    @property
    def out(self) -> int:
        """Outputs; where gate and input go by turns, of whole blocks."""
        if self.is_gated:
            return 2 * -(-self.rows[0] // 16) * 16
        return sum(self.rows)

    @property
    def num_blocks(self) -> int:
        """Blocks of 16 outputs."""
        return -(-self.out // 16)

    @property
    def num_groups(self) -> int:
        """Groups of inputs."""
        return -(-self.width // self.group_size)

    @property
    def padded_group(self) -> int:
        """Inputs of a group, whole chunks of 64 bytes."""
        inputs = _CHUNK_INPUTS[self.kind]
        return -(-self.group_size // inputs) * inputs

    @property
    def is_integer(self) -> bool:
        """Whether there are scales."""
        return self.kind in (WeightKind.INT4, WeightKind.INT8)

    @property
    def value_bytes(self) -> int:
        """Bytes of the packed weights."""
        inputs = self.num_groups * self.padded_group
        return self.num_blocks * 16 * inputs * _BITS_PER_WEIGHT[self.kind] // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales."""
        size = 2 if self.scale_kind is Number.BFLOAT16 else 4
        return self.num_blocks * self.num_groups * 16 * size if self.is_integer else 0

    def placements(self) -> Iterable[tuple[str, int, int, int]]:
        """(tensor, its rows, outputs before it, 0 or its turn among gate and input)."""
        start = 0
        for turn, (name, rows) in enumerate(zip(self.names, self.rows, strict=True)):
            yield name, rows, start, turn + 1 if self.is_gated else 0
            start += rows


class WeightSegment:
    """The matrices of one model: specified one by one, then packed together."""

    def __init__(self, checkpoint: Checkpoint, form: Form) -> None:
        self._checkpoint = checkpoint
        self._form = form
        self._specs: list[MatrixSpec] = []
        self._packed: dict[MatrixSpec, PackedLinear] = {}

    def specify(self, names: Sequence[str], *, is_gated: bool = False) -> list[MatrixSpec]:
        """The matrices that hold these tensors: one if they have the same form, else one each."""
        alone = [self._spec((name,), is_gated=False) for name in names]
        forms = {(one.kind, one.group_size, one.scale_kind) for one in alone}
        if len(forms) == 1 and len(names) > 1:
            alone = [self._spec(tuple(names), is_gated=is_gated)]
        self._specs += alone
        return alone

    def specify_head(self, name: str) -> MatrixSpec:
        """The output layer, rounded at load if the form says so."""
        head = self._form.head
        is_quantized = self._checkpoint.is_quantized(name)
        if head == "auto":
            head = "float" if self._checkpoint.quantization is None else "int8"
        spec = self._spec((name,), is_gated=False)
        if head != "float" and not is_quantized:
            is_int4 = head == "int4"
            spec = MatrixSpec(
                names=(name,),
                rows=spec.rows,
                width=spec.width,
                is_gated=False,
                kind=WeightKind.INT4 if is_int4 else WeightKind.INT8,
                group_size=min(_HEAD_GROUP, spec.width) if is_int4 else spec.width,
                scale_kind=Number.FLOAT32,
                has_float_rows=not self._form.has_integer_activations,
                is_made_here=True,
            )
        self._specs.append(spec)
        return spec

    def pack(self, threads: int) -> None:
        """Give every matrix its memory and fill it, `threads` at a time.

        Raises:
            CheckpointError: scales or weights that are not finite.
        """
        places = []
        total = 0
        for spec in self._specs:
            places.append((total, total + _aligned(spec.value_bytes)))
            total = places[-1][1] + _aligned(spec.scale_bytes)
        memory = np.frombuffer(_new_memory(total), dtype=np.uint8)
        with ThreadPoolExecutor(threads) as pool:
            jobs = [
                pool.submit(
                    self._pack_one,
                    spec,
                    memory[values : values + spec.value_bytes],
                    memory[scales : scales + spec.scale_bytes],
                )
                for spec, (values, scales) in zip(self._specs, places, strict=True)
            ]
            for spec, job in zip(self._specs, jobs, strict=True):
                self._packed[spec] = job.result()

    def packed(self, spec: MatrixSpec) -> PackedLinear:
        """The matrix, once `pack` was called."""
        return self._packed[spec]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices as executed."""
        return sum(linear.nbytes for linear in self._packed.values())

    def norm(self, name: str, *, eps: float, offset: float = 0.0, is_rms: bool = True) -> Norm:
        """The weights of the norm `name`, with `offset` added."""
        weight = self._checkpoint.float32(f"{name}.weight") + np.float32(offset)
        bias = None if is_rms else self._checkpoint.float32(f"{name}.bias")
        return Norm(
            1 if is_rms else 2, pad_vector(weight), None if bias is None else pad_vector(bias), eps
        )

    def _spec(self, names: tuple[str, ...], *, is_gated: bool) -> MatrixSpec:
        checkpoint = self._checkpoint
        shapes = [checkpoint.shape_of(name) for name in names]
        width = shapes[0][1]
        kind, group_size, scale_kind = self._form_of(names[0], width)
        return MatrixSpec(
            names=names,
            rows=tuple(shape[0] for shape in shapes),
            width=width,
            is_gated=is_gated,
            kind=kind,
            group_size=group_size,
            scale_kind=scale_kind,
            has_float_rows=not self._form.has_integer_activations,
            is_made_here=False,
        )

    def _form_of(self, name: str, width: int) -> tuple[WeightKind, int, Number]:
        """Kind, inputs of one scale, and type of the scales."""
        quantization = self._checkpoint.quantization
        if quantization is None or not self._checkpoint.is_quantized(name):
            is_bfloat16 = self._form.floats == "bfloat16"
            kind = WeightKind.BFLOAT16 if is_bfloat16 else WeightKind.FLOAT32
            return kind, width, Number.FLOAT32
        if quantization.bitsandbytes is not None:
            if quantization.bitsandbytes.kind == "int8":
                return WeightKind.INT8, width, Number.FLOAT32
            return WeightKind.BFLOAT16, width, Number.FLOAT32
        group = quantization.group_of(name.removesuffix(".weight"))
        assert group is not None, "a quantized layer without a group"
        scales = self._checkpoint.quantized_parts(name)["weight_scale"].dtype
        kind = WeightKind.INT4 if group.bits == 4 else WeightKind.INT8
        scale_kind = Number.BFLOAT16 if scales == "bfloat16" else Number.FLOAT32
        return kind, group.group_size or width, scale_kind

    def _pack_one(
        self, spec: MatrixSpec, values: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]
    ) -> PackedLinear:
        for name, rows, start, turn in spec.placements():
            shape = (
                rows, spec.width, spec.group_size, spec.padded_group, start, turn,
            )  # fmt: skip
            self._pack_tensor(spec, name, shape, values, scales)
        return PackedLinear(
            kind=spec.kind,
            out=spec.out,
            width=spec.width,
            group_size=spec.group_size,
            padded_group=spec.padded_group,
            num_groups=spec.num_groups,
            values=values,
            scales=scales if spec.is_integer else None,
            scale_kind=spec.scale_kind,
            bias=self._bias(spec),
            has_float_rows=spec.has_float_rows and spec.is_integer,
        )

    def _pack_tensor(
        self, spec: MatrixSpec, name: str, shape: tuple[int, ...],
        values: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8],
    ) -> None:  # fmt: skip
        kernels = load_kernels()
        assert kernels is not None, "packing without the kernels"
        if not spec.is_integer or spec.is_made_here:
            stored = self._floats(name)
            data = np.ascontiguousarray(stored.data)
            verb = spec.kind.name.lower()
            verb = f"quantize-{verb}" if spec.is_made_here else verb
            if not kernels.pack(verb, shape, data, number_of(stored), None, values, scales):
                raise CheckpointError(f"{self._checkpoint.path}: {name} holds NaN or an infinity")
            return
        integers, steps = self._integers(name)
        verb = "words" if integers.dtype == np.dtype("<i4") else "int8"
        kernels.pack(verb, shape, integers, 0, None, values, scales)
        verb = f"scales-{spec.scale_kind.name.lower()}"
        kernels.pack(verb, shape, steps, 0, None, scales, scales)

    def _floats(self, name: str) -> StoredArray:
        if self._checkpoint.is_quantized(name):  # a code book's numbers
            return StoredArray("float32", self._checkpoint.float32(name))
        return self._checkpoint.stored(name)

    def _integers(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """The stored integers, int4 as words, and the scales [rows, groups]."""
        parts = self._checkpoint.quantized_parts(name)
        if "SCB" in parts:
            scales = to_float32(parts["SCB"])[:, None] / np.float32(127.0)
            integers = parts["weight"].data
        else:
            scales = to_float32(parts["weight_scale"])
            integers = parts["weight_packed" if "weight_packed" in parts else "weight"].data
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{self._checkpoint.path}: the scales of {name} hold NaN or an infinity"
            )
        return np.ascontiguousarray(integers), np.ascontiguousarray(scales)

    def _bias(self, spec: MatrixSpec) -> npt.NDArray[np.float32] | None:
        known = self._checkpoint.names()
        names = [name.removesuffix("weight") + "bias" for name in spec.names]
        if not any(name in known for name in names):
            return None
        bias = np.zeros(spec.num_blocks * 16, np.float32)
        for (_, rows, start, turn), name in zip(spec.placements(), names, strict=True):
            if name not in known:
                continue
            row = np.arange(rows)
            place = row // 16 * 32 + (turn - 1) * 16 + row % 16 if turn else start + row
            bias[place] = self._checkpoint.float32(name)
        return bias


def number_of(stored: StoredArray) -> Number:
    """The kernels' number for the type of a stored float tensor."""
    return _NUMBERS[stored.dtype]


def pad_vector(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Zeros behind, to a multiple of 16."""
    padded = np.zeros(-(-len(values) // 16) * 16, np.float32)
    padded[: len(values)] = values
    return padded


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _new_memory(size: int) -> mmap.mmap:
    # Private: shared memory gets no huge pages on most systems, and without them decoding is slower
    # (docs/lab-log.md, 2026-11-25).
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    memory = mmap.mmap(-1, max(size, 1), **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
