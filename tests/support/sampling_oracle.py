"""docs/sampling.md read aloud, in plain Python: slow and obvious, the oracle of every sampler.

Nothing of it comes from the implementation. Sums are of Python's whole numbers, shares are
fractions, and everything is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_float
from fractions import Fraction
from functools import cache

from llmserve.runners.protocol import SamplingRow

__all__ = ["kept_weights", "oracle_logprobs", "oracle_token", "processed", "random_number"]


def oracle_token(logits: Sequence[float], row: SamplingRow) -> int | None:
    """The token of a row of float32 logits; None where the row is not usable."""
    if not all(value < math.inf for value in logits) or max(logits) == -math.inf:
        return None
    weights = kept_weights(logits, row)
    if weights is None:
        return None
    total = sum(weights.values())
    threshold = random_number(row.seed, row.choice_index, row.position) * total // 2**53
    cumulated = 0
    for token_id, weight in sorted(weights.items()):
        cumulated += weight
        if cumulated > threshold:
            return token_id
    raise AssertionError("the weights add up to more than the threshold")


def kept_weights(logits: Sequence[float], row: SamplingRow) -> dict[int, int] | None:
    """Id → weight of what the cuts leave (for a greedy row: of the one it takes); None: nothing."""
    params = row.params
    values = processed(logits, row)
    largest = max(values)
    if not math.isfinite(largest):
        return None
    ranked = sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))
    if params.temperature == 0:
        return {ranked[0]: 2**42}
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    steps = {i: steps_below(values[i], largest, params.temperature) for i in ranked}
    weights = {i: weight_at(steps[i]) for i in ranked if weight_at(steps[i])}
    if params.top_p < 1:
        by_weight = sorted(weights, key=lambda i: (-weights[i], i))
        weights = fewest(by_weight, weights, params.top_p)
    if params.min_p > 0:
        weights = {i: w for i, w in weights.items() if w >= part(params.min_p, 2**42)}
    if params.typical_p < 1:
        bits = {i: steps[i] / 512 for i in weights}
        mean = float(sum(round(w * bits[i]) for i, w in weights.items())) / float(
            sum(weights.values())
        )
        by_distance = sorted(weights, key=lambda i: (abs(bits[i] - mean), i))
        weights = fewest(by_distance, weights, params.typical_p)
    return weights


def processed(logits: Sequence[float], row: SamplingRow) -> list[float]:
    """The logits after penalties, bias and masks: float32 values as Python floats."""
    params = row.params
    values = [float(value) for value in logits]
    generated = row.token_ids[row.num_prompt_tokens :]
    if params.repetition_penalty != 1:
        for i in set(row.token_ids):
            penalty = params.repetition_penalty
            values[i] = float32(values[i] / penalty if values[i] > 0 else values[i] * penalty)
    for i in set(generated):
        penalty = params.presence_penalty + params.frequency_penalty * generated.count(i)
        values[i] = float32(values[i] - penalty)
    for i, bias in params.logit_bias.items():
        values[i] = float32(values[i] + bias)
    banned = set(params.banned_token_ids)
    mask = row.allowed_mask
    if len(generated) < params.min_tokens:
        banned |= set(row.end_token_ids)
    for i in range(len(values)):
        is_allowed = params.allowed_token_ids is None or i in params.allowed_token_ids
        is_masked = mask is not None and not (int(mask[i // 32]) >> (i % 32)) & 1
        if i in banned or is_masked or not is_allowed:
            values[i] = -math.inf
    return values


def float32(value: float) -> float:
    """The nearest float32, infinite beyond the largest."""
    return c_float(value).value


def steps_below(value: float, largest: float, temperature: float) -> float:
    scale = float.fromhex("0x1.71547652b82fep+9") / max(temperature, 1e-9)
    return min((largest - value) * scale, 22016.0)


def weight_at(steps: float) -> int:
    c1 = float.fromhex("0x1.62e42fefa39efp-10")
    c2 = float.fromhex("0x1.ebfbdff82c58fp-21")
    c3 = float.fromhex("0x1.c6b08d704a0c0p-32")
    n = round(steps)
    r = n - steps
    return round((((c3 * r + c2) * r + c1) * r + 1) * power(n))


@cache
def power(n: int) -> float:
    """The float64 nearest to 2**(42 - n / 512), by whole square roots of 256 binary places."""
    one = 1 << 256
    root = 2 * one
    for _ in range(9):
        root = math.isqrt(root * one)
    value = one << 42
    for _ in range(-n % 512):
        value = value * root // one
    return value / (one << -(-n // 512))  # the quotient of whole numbers rounds once


def part(share: float, total: int) -> int:
    return max(1, math.ceil(Fraction(math.floor(share * 2**32), 2**32) * total))


def fewest(ranked: Sequence[int], weights: dict[int, int], share: float) -> dict[int, int]:
    """The shortest beginning of `ranked` that has that share of the weights."""
    least = part(share, sum(weights.values()))
    kept: dict[int, int] = {}
    for token_id in ranked:
        if sum(kept.values()) >= least:
            break
        kept[token_id] = weights[token_id]
    return kept


def random_number(seed: int, choice_index: int, position: int) -> int:
    """53 bits of Philox4x32-10."""
    key_high, key_low = divmod(seed, 2**32)
    position_high, position_low = divmod(position, 2**32)
    words = [position_low, position_high, choice_index, 0]
    for step in range(10):
        high0, low0 = divmod(words[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(words[2] * 0xCD9E8D57, 2**32)
        key0 = (key_low + step * 0x9E3779B9) % 2**32
        key1 = (key_high + step * 0xBB67AE85) % 2**32
        words = [high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0]
    return words[0] * 2**21 + words[1] // 2**11


def oracle_logprobs(logits: Sequence[float], token_id: int) -> float:
    """Log-softmax of the raw logits at one id, its sum exact but for the last rounding."""
    largest = max(logits)
    total = math.fsum(math.exp(value - largest) for value in logits)
    return logits[token_id] - largest - math.log(total)
