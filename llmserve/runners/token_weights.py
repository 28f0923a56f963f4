"""Probabilities as whole numbers, and the cuts that are made by them (docs/sampling.md).

A token's weight is 2**42 times its probability relative to the likeliest one's, rounded. Sums of
whole numbers are exact in any order, and what leads to them uses only operations that IEEE 754
fixes to the bit. So every runner, on any instruction set, keeps and draws the same tokens; an `exp`
of a library would not do (they differ between processors).

Shapes: N tokens under consideration, all of a row or its top k, by ascending id. A cut returns the
weights of those it keeps and 0 in the place of the others.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

from .philox import RANDOM_BITS

__all__ = [
    "C1",
    "C2",
    "C3",
    "MAX_VOCAB_SIZE",
    "MOST_STEPS",
    "POWERS",
    "STEPS",
    "WEIGHT_BITS",
    "by_mass",
    "by_ratio",
    "by_typicality",
    "part",
    "pick",
    "steps_below",
    "steps_per_unit",
    "weights_at",
    "whole_share",
]

MAX_VOCAB_SIZE = 2**21 - 1
"""Most tokens whose weights add up within 63 bits."""

WEIGHT_BITS = 42
"""The likeliest token weighs 2 to that power."""
STEPS = 512
"""Steps in which a probability halves."""
MOST_STEPS = (WEIGHT_BITS + 1) * STEPS
"""Here a weight rounds to 0; whatever is less likely counts as this."""
_SHARE_BITS = 32
_LEAST_TEMPERATURE = 1e-9
"""Temperatures under it count as it: no product of logits overflows then."""
_BLOCK = 4096
"""Tokens weighed at a time: their arrays stay in the cache and cost no new pages."""
_STEPS_PER_NAT = float.fromhex("0x1.71547652b82fep+9")  # 512 / ln 2
# exp(r ln 2 / 512) to the third power of r, for |r| up to a half: off by at most 6e-16.
C1 = float.fromhex("0x1.62e42fefa39efp-10")
C2 = float.fromhex("0x1.ebfbdff82c58fp-21")
C3 = float.fromhex("0x1.c6b08d704a0c0p-32")

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _powers() -> Doubles:
    """The float64 nearest to 2**(42 - n / 512), for n from 0 to the most steps."""
    with localcontext(prec=50):
        root = Decimal(2) ** (Decimal(-1) / STEPS)
        fractions = np.array([float(root**n) for n in range(STEPS)])
    octaves = np.ldexp(1.0, np.arange(WEIGHT_BITS, -2, -1))
    powers: Doubles = np.outer(octaves, fractions).ravel()[: MOST_STEPS + 1]
    return powers


POWERS = _powers()


def steps_below(logits: Floats, largest: float, temperature: float) -> Doubles:
    """How much less likely than the likeliest each token is: 512 steps halve the probability.

    Args:
        logits: [N], minus infinity where a token is excluded.
        largest: The largest logit of the row, finite.
        temperature: Above 0.
    """
    steps = np.subtract(largest, logits, dtype=np.float64)
    steps *= steps_per_unit(temperature)
    return np.minimum(steps, MOST_STEPS, out=steps)


def steps_per_unit(temperature: float) -> float:
    """Steps that a difference of 1 between two logits makes at a temperature above 0."""
    return _STEPS_PER_NAT / max(temperature, _LEAST_TEMPERATURE)


def weights_at(steps: Doubles) -> Ints:
    """Weights 0..2**42 of tokens that many steps below the likeliest. [N]"""
    weights = np.empty(len(steps), dtype=np.int64)
    for start in range(0, len(steps), _BLOCK):
        block = slice(start, start + _BLOCK)
        weights[block] = _weights_of_block(steps[block])
    return weights


def _weights_of_block(steps: Doubles) -> Doubles:
    whole = np.rint(steps)
    rest = whole - steps  # exact
    weights = rest * C3
    weights += C2
    weights *= rest
    weights += C1
    weights *= rest
    weights += 1.0
    # All are in range; only so numpy writes to `out` without a buffer.
    weights *= POWERS.take(whole.astype(np.int64), out=whole, mode="clip")
    return np.rint(weights, out=weights)


def by_mass(weights: Ints, top_p: float) -> Ints:
    """Keep the fewest, heaviest tokens whose share of the total reaches `top_p`."""
    total = int(weights.sum())
    least = part(top_p, total)
    # So light a token is never needed: all of them together weigh no more than what may be missing.
    places = np.flatnonzero(weights > (total - least) // len(weights))
    return _keep_first(weights, places, -weights[places], least)


def by_ratio(weights: Ints, min_p: float) -> Ints:
    """Keep the tokens at least `min_p` times as likely as the likeliest."""
    return np.where(weights >= part(min_p, 1 << WEIGHT_BITS), weights, 0)


def by_typicality(weights: Ints, steps: Doubles, typical_p: float) -> Ints:
    """Keep the fewest, most typical tokens whose share of the total reaches `typical_p`.

    Typical is what is about as surprising as a token is on average: | -log p - entropy | is small
    (Meister et al. 2022, arXiv:2202.00666, section 4). The logarithm of the total is in both terms
    and cancels.
    """
    places = np.flatnonzero(weights > 0)
    kept, bits = weights[places], steps[places] * (1 / STEPS)
    total = int(kept.sum())
    mean = float(int(np.rint(kept * bits).astype(np.int64).sum())) / float(total)
    return _keep_first(weights, places, np.abs(bits - mean), part(typical_p, total))


def pick(weights: Ints, random: int) -> int:
    """The place that `random`, of 0..2**53-1, falls on when the weights are laid end to end."""
    cumulated = weights.cumsum()
    return int(cumulated.searchsorted(random * int(cumulated[-1]) >> RANDOM_BITS, side="right"))


def part(share: float, total: int) -> int:
    """The weight that reaches `share` of `total`, at least 1."""
    return max(1, -(-whole_share(share) * total >> _SHARE_BITS))


def whole_share(share: float) -> int:
    """A share in units of 2**-32, rounded down.

    So nine of ten equal tokens reach 0.9, the float64 next to which lies above nine tenths.
    """
    return int(share * 2**_SHARE_BITS)


def _keep_first(weights: Ints, places: Ints, ranks: Ints | Doubles, least: int) -> Ints:
    """Keep the fewest of `places`, lowest rank first, that weigh `least` together.

    Equal ranks go to the lower place. The order in which a sort leaves them does not matter: the
    rank at which the sum is reached is the same, and only there a choice is to be made.
    """
    given = weights[places]
    order = ranks.argsort()
    border = ranks[order[given[order].cumsum().searchsorted(least)]]
    is_kept = ranks < border
    missing = least - int(given[is_kept].sum())
    ties = np.flatnonzero(ranks == border)
    count = int(given[ties].cumsum().searchsorted(missing)) + 1
    is_kept[ties[:count]] = True
    kept = np.zeros_like(weights)
    kept[places[is_kept]] = given[is_kept]
    return kept
