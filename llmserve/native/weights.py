"""A checkpoint's matrices in the kernels' layout, in one piece of memory.

First every matrix is specified: which tensors it joins (query, key and value; gate and input), in
which form it is executed, how many bytes it takes. Then all of them get their places in one
segment and are packed there, several at a time: packing runs in C++ without the interpreter's lock.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..quant.dtypes import StoredArray
from .kernels import load_kernels
from .matrix_specs import MatrixSpec
from .program import Norm, Number, PackedLinear, WeightKind
from .stored_integers import number_of, read_integers, stored_form

__all__ = ["Form", "WeightSegment", "pad_vector"]

Octets = npt.NDArray[np.uint8]

_ALIGNMENT = 64  # bytes: a cache line
_HEAD_GROUP = 32
"""Inputs of one scale of an int4 head made at load."""


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
        forms = {(one.kind, one.group_size, one.scale_kind, one.has_zeros) for one in alone}
        # An order of inputs is one matrix's own.
        has_order = any(one.has_order for one in alone)
        if len(forms) == 1 and len(names) > 1 and not has_order:
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
        starts = []
        total = 0
        for spec in self._specs:
            starts.append(total)
            total += sum(map(_aligned, spec.sizes))
        memory = np.frombuffer(_new_memory(total), dtype=np.uint8)
        with ThreadPoolExecutor(threads) as pool:
            jobs = [
                pool.submit(self._pack_one, spec, *_cut(memory, start, spec.sizes))
                for spec, start in zip(self._specs, starts, strict=True)
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
        form = stored_form(
            checkpoint, names[0], floats=self._form.floats,
            has_integer_activations=self._form.has_integer_activations,
        )  # fmt: skip
        return MatrixSpec(
            names=names,
            rows=tuple(shape[0] for shape in shapes),
            width=width,
            is_gated=is_gated,
            kind=form.kind,
            group_size=form.group_size,
            scale_kind=form.scale_kind,
            has_float_rows=form.has_float_rows,
            has_zeros=form.has_zeros,
            has_order=form.has_order,
        )

    def _pack_one(
        self, spec: MatrixSpec, values: Octets, scales: Octets, zeros: Octets
    ) -> PackedLinear:
        order = None
        for name, rows, start, turn in spec.placements():
            shape = (
                rows, spec.width, spec.group_size, spec.padded_group, start, turn,
            )  # fmt: skip
            if spec.is_integer and not spec.is_made_here:
                order = self._pack_integers(spec, name, shape, (values, scales, zeros))
            else:
                self._pack_floats(spec, name, shape, values, scales)
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
            zeros=zeros if spec.has_zeros else None,
            bias=self._bias(spec),
            has_float_rows=spec.has_float_rows and spec.is_integer,
            order=order,
        )

    def _pack_floats(
        self, spec: MatrixSpec, name: str, shape: tuple[int, ...], values: Octets, scales: Octets
    ) -> None:
        stored = self._floats(name)
        data = np.ascontiguousarray(stored.data)
        verb = spec.kind.name.lower()
        verb = f"quantize-{verb}" if spec.is_made_here else verb
        if not _pack(verb, shape, data, values, scales, kind=number_of(stored)):
            raise CheckpointError(f"{self._checkpoint.path}: {name} holds NaN or an infinity")

    def _pack_integers(
        self, spec: MatrixSpec, name: str, shape: tuple[int, ...],
        targets: tuple[Octets, Octets, Octets],
    ) -> npt.NDArray[np.int32] | None:  # fmt: skip
        """Pack one tensor's integers; the order of its inputs, where it has one."""
        values, scales, zeros = targets
        stored = read_integers(self._checkpoint, name)
        order = stored.order if spec.has_order else None
        verb = "words" if stored.is_packed else spec.kind.name.lower()
        _pack(verb, shape, stored.integers, values, order=order)
        _pack(f"scales-{spec.scale_kind.name.lower()}", shape, stored.scales, scales)
        if stored.zeros is not None:
            _pack("zeros", shape, stored.zeros, zeros)
        return order

    def _floats(self, name: str) -> StoredArray:
        if self._checkpoint.is_quantized(name):  # a code book's numbers, or a mixed order
            return StoredArray("float32", self._checkpoint.float32(name))
        return self._checkpoint.stored(name)

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


def pad_vector(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Zeros behind, to a multiple of 16."""
    padded = np.zeros(-(-len(values) // 16) * 16, np.float32)
    padded[: len(values)] = values
    return padded


def _pack(
    verb: str, shape: tuple[int, ...], source: npt.NDArray[Any], target: Octets,
    scales: Octets | None = None, *, kind: int = 0, order: npt.NDArray[np.int32] | None = None,
) -> bool:  # fmt: skip
    kernels = load_kernels()
    assert kernels is not None, "packing without the kernels"
    scales = target if scales is None else scales
    return bool(kernels.pack(verb, shape, source, kind, order, target, scales))


def _cut(memory: Octets, start: int, sizes: tuple[int, ...]) -> list[Octets]:
    """Pieces of those sizes, each from a whole cache line on."""
    pieces = []
    for size in sizes:
        pieces.append(memory[start : start + size])
        start += _aligned(size)
    return pieces


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
