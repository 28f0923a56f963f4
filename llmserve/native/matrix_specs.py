"""One matrix of a program before it is packed: its source, its form, its size in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .program import Number, WeightKind

__all__ = ["MatrixSpec"]

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
    has_zeros: bool = False
    """Whether groups have zero points."""
    has_order: bool = False
    """Whether inputs are in another order than the rows' (GPTQ's activation order)."""
    is_made_here: bool = False
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

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zero points."""
        return self.num_blocks * self.num_groups * 16 if self.has_zeros else 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of weights, scales and zero points."""
        return self.value_bytes, self.scale_bytes, self.zero_bytes

    def placements(self) -> Iterable[tuple[str, int, int, int]]:
        """(tensor, its rows, outputs before it, 0 or its turn among gate and input)."""
        start = 0
        for turn, (name, rows) in enumerate(zip(self.names, self.rows, strict=True)):
            yield name, rows, start, turn + 1 if self.is_gated else 0
            start += rows
