"""A model's step as a flat list of operations, written down once and run by C++.

Codes, arguments and tables mirror `csrc/executor.h`. Buffers are float32 rows, one for each member
of a `Domain`. Slots are places for activations
made ready for a product: normalized, as float32 or as integers with a scale for each group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Activation",
    "Code",
    "Domain",
    "Epilogue",
    "Norm",
    "Number",
    "PackedLinear",
    "Program",
    "WeightKind",
    "address_of",
]

_NUM_ARGUMENTS = 12
_NUM_REALS = 4


class Code(IntEnum):
    """Operations."""

    EMBED = 0
    PREPARE = 1
    LINEAR = 2
    ROPE = 3
    ATTEND = 4
    ADD_NORM = 5
    GATHER = 6
    GATE = 7
    NORM = 8
    SAMPLE = 9
    LORA = 10
    ROUTE = 11
    DISPATCH = 12
    EXPERTS = 13
    COMBINE = 14
    ADD_GATED = 15
    ADD = 16


class Domain(IntEnum):
    """What there are rows for."""

    TOKENS = 0
    """Tokens of the step."""
    ROWS = 1
    """Rows whose logits are asked for."""
    ROUTED = 2
    """Tokens, once for each expert that they go through, expert after expert."""


class Number(IntEnum):
    """Types of stored numbers."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3


class WeightKind(IntEnum):
    """Layouts of packed weights (csrc/pack.h)."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT4 = 2
    INT8 = 3


class Epilogue(IntEnum):
    """What becomes of a product: stored, added, or through an activation."""

    STORE = 0
    ADD = 1
    SWIGLU = 2
    GEGLU_TANH = 3
    GELU = 4
    GELU_TANH = 5


@dataclass(frozen=True, slots=True)
class Activation:
    """How a product wants its input: the key of a slot."""

    has_values: bool
    """Rows of float32."""
    group_size: int | None
    """Rows of integers in groups of so many inputs; None: no integers."""
    chunk_inputs: int
    """Groups are padded to a multiple of it."""
    num_digits: int = 1
    """Bytes of an integer."""
    order: npt.NDArray[np.int32] | None = None
    """Input permutation of the integers."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight in the kernels' layout; the arrays are views of memory that must outlive it."""

    kind: WeightKind
    out: int
    width: int
    group_size: int
    padded_group: int
    num_groups: int
    values: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint8] | None = None
    scale_kind: Number = Number.FLOAT32
    zeros: npt.NDArray[np.uint8] | None = None
    bias: npt.NDArray[np.float32] | None = None
    has_float_rows: bool = False
    order: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        # Weights in another order of inputs are multiplied with rows in that order: int8 ones.
        assert self.order is None or not self.has_float_rows

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        arrays = (self.values, self.scales, self.zeros, self.bias)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def activation(self) -> Activation:
        """How it wants its input."""
        if self.kind in (WeightKind.FLOAT32, WeightKind.BFLOAT16) or self.has_float_rows:
            return Activation(True, None, 1)
        if self.kind is WeightKind.INT4:
            return Activation(False, self.group_size, 8, 1, self.order)
        return Activation(False, self.group_size, 4, 2, self.order)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A norm's weights; `kind` 1: by the root of the mean square, 2: by mean and variance."""

    kind: int
    weight: npt.NDArray[np.float32]  # [width padded to 16]
    bias: npt.NDArray[np.float32] | None
    eps: float


def address_of(array: npt.NDArray[Any] | None) -> int:
    """Where the array's memory begins; 0 for None."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


@dataclass(slots=True)
class Program:
    """The operations of a step, as they are written down. It keeps alive what it points to."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_groups: list[int]
    """Cache group of each layer."""
    windows: list[int]
    """Window of each cache group, 0: none."""
    num_experts_per_token: int = 0
    num_adapters: int = 0
    adapters: list[int] = field(default_factory=list)
    """For each `lora` and adapter the indices of its two matrices, or -1."""
    codes: list[list[int]] = field(default_factory=list)
    reals: list[list[float]] = field(default_factory=list)
    linears: list[PackedLinear] = field(default_factory=list)
    buffers: list[tuple[int, Domain]] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    _slot_of: dict[tuple[object, ...], int] = field(default_factory=dict)

    def buffer(self, width: int, domain: Domain = Domain.TOKENS) -> int:
        """A buffer of rows that wide."""
        self.buffers.append((-(-width // 16) * 16, domain))
        return len(self.buffers) - 1

    def embed(
        self, out: int, table: npt.NDArray[Any], kind: Number, width: int, *, scale: float,
        positions: npt.NDArray[Any] | None, position_kind: Number,
    ) -> None:  # fmt: skip
        """out = table[id] * scale + positions[position]."""
        self.kept += [table, positions]
        self._add(
            Code.EMBED, Domain.TOKENS,
            [out, address_of(table), kind, width, address_of(positions), position_kind], [scale],
        )  # fmt: skip

    def prepare(
        self, source: int, width: int, norm: Norm | None, linear: PackedLinear,
        domain: Domain = Domain.TOKENS, *, needs_values: bool = False,
    ) -> int:  # fmt: skip
        """Make rows of `source` ready for products like `linear`; the slot where they are.

        `needs_values`: float32 rows too, whatever `linear` wants.
        """
        wanted = linear.activation
        has_values = (
            needs_values or wanted.has_values or norm is not None or wanted.order is not None
        )
        slot = self._slot(width, wanted, has_values, domain)
        self._add(
            Code.PREPARE, domain, [source, slot, width, *self._norm(norm)],
            [norm.eps if norm else 0.0],
        )  # fmt: skip
        return slot

    def linear(
        self, slot: int, linear: PackedLinear, epilogue: Epilogue, out: int,
        domain: Domain = Domain.TOKENS, *, column: int = 0, cap: float = 0.0,
    ) -> None:  # fmt: skip
        """The product of a slot's rows, to `out` from its column `column` on."""
        self.linears.append(linear)
        arguments = [slot, len(self.linears) - 1, epilogue, out, column]
        self._add(Code.LINEAR, domain, arguments, [cap])

    def rope(
        self, qkv: int, layer: int, *, rotary_dim: int, table: int,
        query_norm: Norm | None, key_norm: Norm | None, is_whole_norm: bool,
    ) -> None:  # fmt: skip
        """Norm and turn queries and keys, write keys and values to the cache."""
        self.kept += [query_norm, key_norm]
        weights = [address_of(norm.weight) if norm else 0 for norm in (query_norm, key_norm)]
        self._add(
            Code.ROPE, Domain.TOKENS, [qkv, layer, rotary_dim, table, *weights, is_whole_norm],
            [query_norm.eps if query_norm else 0.0],
        )  # fmt: skip

    def attend(self, qkv: int, layer: int, out: int, *, scale: float, cap: float) -> None:
        """Attention over the cache."""
        self._add(Code.ATTEND, Domain.TOKENS, [qkv, layer, out], [scale, cap])

    def add_norm(self, source: int, out: int, width: int, norm: Norm) -> None:
        """out += norm(source)."""
        self._add(Code.ADD_NORM, Domain.TOKENS, [source, out, width, *self._norm(norm)], [norm.eps])

    def gather(self, source: int, out: int) -> None:
        """The rows asked for."""
        self._add(Code.GATHER, Domain.ROWS, [source, out], [])

    def norm(self, buffer: int, width: int, norm: Norm) -> None:
        """buffer = norm(buffer), on the rows asked for."""
        self._add(Code.NORM, Domain.ROWS, [buffer, width, *self._norm(norm)], [norm.eps])

    def sample(self, logits: int, width: int) -> None:
        """A token from each row of logits."""
        self._add(Code.SAMPLE, Domain.ROWS, [logits, width], [])

    def gate(self, gate: int, up: int, out: int, epilogue: Epilogue) -> None:
        """out = activation(gate) * up, or of a plain activation that of `gate` alone."""
        self._add(Code.GATE, Domain.TOKENS, [gate, up, out, epilogue], [])

    def lora(
        self, slot: int, pairs: list[tuple[PackedLinear, PackedLinear] | None], out: int,
        *, column: int = 0,
    ) -> None:  # fmt: skip
        """out += B (A x), from `column` on, with each sequence's own of the adapters' `pairs`."""
        entry = len(self.adapters) // max(1, 2 * self.num_adapters)
        for pair in pairs:
            if pair is None:
                self.adapters += [-1, -1]
                continue
            self.adapters += [len(self.linears), len(self.linears) + 1]
            self.linears += pair
        self._add(Code.LORA, Domain.TOKENS, [slot, entry, out, column], [])

    def route(self, logits: int, num_experts: int, *, is_normalized: bool) -> None:
        """Choose each token's experts by the router's `logits`."""
        self._add(
            Code.ROUTE, Domain.TOKENS,
            [logits, num_experts, self.num_experts_per_token, is_normalized], [],
        )  # fmt: skip

    def dispatch(self, source: int, out: int) -> None:
        """Each token's row to the places of its experts."""
        self._add(Code.DISPATCH, Domain.ROUTED, [source, out], [])

    def experts(self, slot: int, linears: list[PackedLinear], epilogue: Epilogue, out: int) -> None:
        """The product of each expert's rows with its own matrix; all are of one size."""
        first = len(self.linears)
        self.linears += linears
        self._add(Code.EXPERTS, Domain.ROUTED, [slot, first, epilogue, out, len(linears)], [])

    def combine(self, source: int, out: int) -> None:
        """out = the weighted sum of each token's experts, by ascending expert."""
        self._add(Code.COMBINE, Domain.TOKENS, [source, out], [])

    def add(self, source: int, out: int) -> None:
        """out += source."""
        self._add(Code.ADD, Domain.TOKENS, [source, out], [])

    def add_gated(self, source: int, gate: int, out: int) -> None:
        """out += source * sigmoid(gate), one gate for each row."""
        self._add(Code.ADD_GATED, Domain.TOKENS, [source, gate, out], [])

    def tables(self) -> tuple[npt.NDArray[Any], ...]:
        """Everything as the arrays that `_kernels.new` takes, in its order."""
        geometry = [
            self.num_heads, self.num_kv_heads, self.head_dim, len(self.layer_groups),
            len(self.windows), self.num_experts_per_token, self.num_adapters,
        ]  # fmt: skip
        return (
            _int64(geometry), _int64(self.codes), np.array(self.reals, np.float64),
            _int64([_row(linear) for linear in self.linears]),
            _int64([list(buffer) for buffer in self.buffers]), _int64(self.slots),
            _int64(self.layer_groups), _int64(self.windows), _int64(self.adapters),
        )  # fmt: skip

    def _add(self, code: Code, domain: Domain, arguments: list[int], reals: list[float]) -> None:
        padding = [0] * (_NUM_ARGUMENTS - len(arguments))
        self.codes.append([code, domain, *arguments, *padding])
        self.reals.append(reals + [0.0] * (_NUM_REALS - len(reals)))

    def _norm(self, norm: Norm | None) -> list[int]:
        if norm is None:
            return [0, 0, 0]
        self.kept.append(norm)
        return [norm.kind, address_of(norm.weight), address_of(norm.bias)]

    def _slot(self, width: int, wanted: Activation, has_values: bool, domain: Domain) -> int:
        size = wanted.group_size
        form = (size, wanted.chunk_inputs, wanted.num_digits, id(wanted.order))
        key = (width, has_values, *form, domain)
        if key not in self._slot_of:
            padded = 0 if size is None else -(-size // wanted.chunk_inputs) * wanted.chunk_inputs
            num_groups = 0 if size is None else -(-width // size)
            self.kept.append(wanted.order)
            self.slots.append(
                [domain, has_values, size is not None, width, size or 0, padded, num_groups,
                 wanted.num_digits, address_of(wanted.order)]
            )  # fmt: skip
            self._slot_of[key] = len(self.slots) - 1
        return self._slot_of[key]


def _row(linear: PackedLinear) -> list[int]:
    return [
        linear.kind, linear.has_float_rows, linear.out, linear.width, linear.group_size,
        linear.padded_group, linear.num_groups, address_of(linear.values),
        address_of(linear.scales), linear.scale_kind, address_of(linear.zeros),
        address_of(linear.bias),
    ]  # fmt: skip


def _int64(values: object) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(np.array(values, dtype=np.int64))
