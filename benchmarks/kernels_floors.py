"""What an operation of the native runner needs at least: bytes to read, multiply-adds to do.

The roofline model (Williams, Waterman and Patterson 2009, "Roofline", section 3): no kernel is
faster than the longer of its bytes over the bandwidth and its operations over the peak of the
instructions that it is made of. What is not counted makes the floor lower, never higher: scales,
attention's exponentials, results written, activations (they are in a cache), meetings of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llmserve.config import ModelConfig
from llmserve.native.program import PackedLinear, WeightKind

__all__ = [
    "Family",
    "Need",
    "Rates",
    "attention_need",
    "linear_need",
    "prepare_need",
    "sampling_need",
]

_PREPARED_NORM = 2  # of each value: its square added, its product with the norm's weight
_PREPARED_INT8 = 2  # compared with the largest of its group, divided by the group's scale

_COPIED = 1
_WEIGHED = 20  # of a logit: ten operations of float64, of which half as many go together


class Family(StrEnum):
    """Instructions that an operation is made of."""

    INT4_DOT = "int4 dot"
    INT8_DOT = "int8 dot"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine does per second at most, all threads together."""

    read_bytes: float
    """From memory."""
    int4_dots: float
    """Multiply-adds of 4-bit weights with bytes."""
    int8_dots: float
    """Of 8-bit weights with bytes."""
    floats: float
    """Of float32."""

    def of(self, family: Family) -> float:
        """Multiply-adds per second of a family."""
        return {
            Family.INT4_DOT: self.int4_dots,
            Family.INT8_DOT: self.int8_dots,
            Family.FLOAT32: self.floats,
        }[family]

    def best_with(self, other: Rates) -> Rates:
        """The higher of each."""
        return Rates(
            read_bytes=max(self.read_bytes, other.read_bytes),
            int4_dots=max(self.int4_dots, other.int4_dots),
            int8_dots=max(self.int8_dots, other.int8_dots),
            floats=max(self.floats, other.floats),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one operation needs."""

    read_bytes: int
    """That are in no cache when it begins."""
    operations: int
    """Multiply-adds, or others that take as long."""
    family: Family

    def floor_s(self, rates: Rates) -> float:
        """Seconds under which no kernel gets."""
        return max(self._memory_s(rates), self._arithmetic_s(rates))

    def bound(self, rates: Rates) -> str:
        """What takes the longer: `memory`, or the family."""
        is_memory = self._memory_s(rates) >= self._arithmetic_s(rates)
        return "memory" if is_memory else self.family.value

    def _memory_s(self, rates: Rates) -> float:
        return self.read_bytes / rates.read_bytes

    def _arithmetic_s(self, rates: Rates) -> float:
        return self.operations / rates.of(self.family)


def linear_need(linear: PackedLinear, num_rows: int) -> Need:
    """A product of `num_rows` rows: the packed weight once, a multiply-add for each weight and
    byte of a row.

    The padding of outputs and groups is read, but its products are no work that is needed.
    """
    return Need(
        read_bytes=linear.nbytes,
        operations=num_rows * linear.out * linear.width * linear.activation.num_digits,
        family=_family_of(linear),
    )


def attention_need(
    config: ModelConfig, token_bytes: int, *, num_seqs: int, num_queries: int, context_len: int
) -> Need:
    """Attention of one layer, causal, without a window: scores, and values by their weights.

    Args:
        config: The model.
        token_bytes: Of one token's keys and values in one layer.
        num_seqs: Sequences in the step.
        num_queries: Tokens of each, the last ones of its context.
        context_len: Tokens that the last of them sees.
    """
    before = context_len - num_queries
    num_pairs = num_queries * before + num_queries * (num_queries + 1) // 2
    return Need(
        read_bytes=num_seqs * context_len * token_bytes,
        operations=2 * num_seqs * num_pairs * config.num_heads * config.head_dim,
        family=Family.FLOAT32,
    )


def prepare_need(linear: PackedLinear, num_rows: int, *, has_norm: bool) -> Need:
    """Rows made ready for products like `linear`: normalized, rounded to int8 where it wants so,
    or copied."""
    is_int8 = linear.activation.group_size is not None
    each = _PREPARED_NORM * has_norm + _PREPARED_INT8 * is_int8 or _COPIED
    return Need(read_bytes=0, operations=num_rows * linear.width * each, family=Family.FLOAT32)


def sampling_need(vocab_size: int, num_rows: int, *, is_greedy: bool, cache_bytes: int) -> Need:
    """A token from each row: each logit is compared with the largest; for a draw from the whole
    vocabulary it is weighed too (docs/sampling.md, step 6).

    The logits were written just before: they are read from memory where they exceed the cache.
    """
    num_bytes = 4 * num_rows * vocab_size
    return Need(
        read_bytes=num_bytes if num_bytes > cache_bytes else 0,
        operations=num_rows * vocab_size * (1 if is_greedy else 1 + _WEIGHED),
        family=Family.FLOAT32,
    )


def _family_of(linear: PackedLinear) -> Family:
    is_integer = linear.kind in (WeightKind.INT4, WeightKind.INT8)
    if not is_integer or linear.has_float_rows:
        return Family.FLOAT32
    return Family.INT4_DOT if linear.kind is WeightKind.INT4 else Family.INT8_DOT
