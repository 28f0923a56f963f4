"""`token_weights.py` for many rows at once, in torch: on any device the same whole numbers.

What IEEE 754 fixes to the bit is an operation of its own here, on float64: torch runs each as a
kernel that rounds once. Nothing is divided by a number of the host (torch would multiply with its
inverse). The other arithmetic is of int64. Shapes depend on the rows' parameters alone, never on
the logits, so that the host need not wait for a value.

Shapes: R rows, V vocabulary; parameters of the rows stand in columns [R, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import RANDOM_BITS
from .token_weights import C1, C2, C3, MAX_VOCAB_SIZE, MOST_STEPS, POWERS, STEPS, WEIGHT_BITS

__all__ = [
    "by_mass",
    "by_rank",
    "by_ratio",
    "by_typicality",
    "most_likely",
    "part",
    "pick",
    "powers_on",
    "steps_below",
    "weights_at",
]

_ID_BITS = MAX_VOCAB_SIZE.bit_length()
_LIMB_BITS = 21
_LIMB = (1 << _LIMB_BITS) - 1
_DISTANCE_BITS = 63
"""Of a positive float64, read as a whole number."""


def powers_on(device: torch.device) -> Tensor:
    """The table that `weights_at` takes, on a device."""
    return torch.from_numpy(POWERS).to(device)


def most_likely(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits of each row, largest first, ties to the lowest id."""
    keys = _sort_keys(logits).topk(count, dim=1).values
    return MAX_VOCAB_SIZE - (keys & MAX_VOCAB_SIZE)


def steps_below(logits: Tensor, largest: Tensor, steps_per_unit: Tensor) -> Tensor:
    """As in `token_weights`, [R, V] float64; rows that are not usable are in range too."""
    steps = largest.double() - logits.double()
    steps *= steps_per_unit
    return steps.nan_to_num_(nan=MOST_STEPS).clamp_(0.0, MOST_STEPS)


def weights_at(steps: Tensor, powers: Tensor) -> Tensor:
    """Weights [R, V], int64, of tokens that many steps below the likeliest."""
    whole = steps.round()
    rest = whole - steps  # exact
    weights = rest * C3
    weights += C2
    weights *= rest
    weights += C1
    weights *= rest
    weights += 1.0
    weights *= powers[whole.long()]
    return weights.round_().long()


def by_rank(weights: Tensor, logits: Tensor, counts: Tensor, *, most: int) -> Tensor:
    """Keep the `counts` largest logits of each row, ties to the lowest id; `most`: of any row."""
    keys = _sort_keys(logits)
    border = keys.topk(most, dim=1).values.gather(1, counts - 1)
    return torch.where(keys >= border, weights, 0)


def by_mass(weights: Tensor, shares: Tensor) -> Tensor:
    """Keep the fewest, heaviest tokens that have a share; `shares` are whole (`whole_share`)."""
    least = part(shares, weights.sum(1, keepdim=True))
    return _keep_first(weights, (1 << WEIGHT_BITS) - weights, least, num_bits=WEIGHT_BITS + 1)


def by_ratio(weights: Tensor, least: Tensor) -> Tensor:
    """Keep the tokens that weigh `least`."""
    return torch.where(weights >= least, weights, 0)


def by_typicality(weights: Tensor, steps: Tensor, shares: Tensor) -> Tensor:
    """Keep the fewest, most typical tokens that have a share."""
    bits = steps * (1 / STEPS)
    total = weights.sum(1, keepdim=True)
    surprise = (weights.double() * bits).round_().long().sum(1, keepdim=True)
    distances = (bits - surprise.double() / total.double()).abs_()
    # Positive floats ascend as their bits do. Those of rows without a weight are no numbers.
    ranks = distances.nan_to_num_(nan=0.0).view(torch.int64)
    return _keep_first(weights, ranks, part(shares, total), num_bits=_DISTANCE_BITS)


def pick(weights: Tensor, random: Tensor) -> Tensor:
    """The place [R] that each row's random number falls on when its weights are laid end to end.

    V for a row without a weight.
    """
    cumulated = weights.cumsum(1)
    threshold = _scaled(random, cumulated[:, -1:])
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0]


def part(shares: Tensor, total: Tensor) -> Tensor:
    """ceil(shares * total / 2**32), at least 1; shares up to 2**32, totals of 63 bits."""
    low = total & 0xFFFFFFFF
    lowest, middle = shares * (low & 0xFFFF), shares * (low >> 16)
    middle += lowest >> 16
    is_cut = ((middle | lowest) & 0xFFFF) != 0
    return (shares * (total >> 32) + (middle >> 16) + is_cut).clamp_(min=1)


def _sort_keys(logits: Tensor) -> Tensor:
    """Whole numbers [R, V] in the order of float32 logits, of equal ones the lowest id's largest.

    The upper bits are the float's, turned so that they ascend; the lower ones count ids backwards.
    No two of a row are alike, so that no sort has a choice.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return (ascending.long() << _ID_BITS) + (MAX_VOCAB_SIZE - ids)


def _scaled(random: Tensor, total: Tensor) -> Tensor:
    """floor(random * total / 2**53), of 53 and of 63 bits, by limbs of 21."""
    a0, a1, a2 = random & _LIMB, random >> _LIMB_BITS & _LIMB, random >> 2 * _LIMB_BITS
    b0, b1, b2 = total & _LIMB, total >> _LIMB_BITS & _LIMB, total >> 2 * _LIMB_BITS
    carried = a0 * b1 + a1 * b0 + (a0 * b0 >> _LIMB_BITS)
    middle = a0 * b2 + a1 * b1 + a2 * b0 + (carried >> _LIMB_BITS)  # times 2**42
    cut = RANDOM_BITS - 2 * _LIMB_BITS
    upper = a1 * b2 + a2 * b1  # times 2**63
    highest = a2 * b2  # times 2**84
    return (middle >> cut) + (upper << _LIMB_BITS - cut) + (highest << 2 * _LIMB_BITS - cut)


def _keep_first(weights: Tensor, ranks: Tensor, least: Tensor, *, num_bits: int) -> Tensor:
    """Keep the fewest tokens, lowest rank first, that weigh `least` [R, 1] together.

    Equal ranks go to the lower id. The rank at which the sum is reached is found bit by bit, from
    sums of what ranks below it: a sort of the vocabulary would take more memory.

    Args:
        weights: [R, V], a row's together at least `least`, or all 0.
        ranks: [R, V], 0..2**num_bits - 1.
        least: At least 1.
        num_bits: Of a rank.
    """
    border = torch.zeros_like(least)
    for bit in range(num_bits - 1, -1, -1):
        higher = border | (1 << bit)
        border = torch.where(_below(weights, ranks, higher) < least, higher, border)
    missing = least - _below(weights, ranks, border)
    ties = torch.where(ranks == border, weights, 0)
    is_needed = ties.cumsum(1) - ties < missing
    return torch.where((ranks < border) | ((ties > 0) & is_needed), weights, 0)


def _below(weights: Tensor, ranks: Tensor, border: Tensor) -> Tensor:
    """The weight of everything that ranks below `border`, [R, 1]."""
    return torch.where(ranks < border, weights, 0).sum(1, keepdim=True)
