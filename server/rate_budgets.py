"""What a key may use in a minute: requests, and tokens of prompts and answers together.

A budget fills again continuously, up to a minute's worth. Tokens are charged when a request has
ended, since nobody knows before how many it takes: a budget may be overdrawn by what is under way,
and the next request waits until that is paid back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from llmserve.errors import ConfigError, OverloadedError

__all__ = ["Account", "Budget", "RateBudgets"]

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds of one key; None: no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


class _Bucket:
    """An amount that grows back to a minute's worth; below 0 it is owed."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._most = float(per_minute)
        self._rate = per_minute / MINUTE_S
        self._amount = self._most
        self._time = now

    def take(self, amount: float, now: float) -> None:
        """Take that much, whether it is there or not."""
        self._amount = self._amount_at(now) - amount
        self._time = now

    def seconds_until(self, amount: float, now: float) -> float:
        """Time until that much is there."""
        return max(0.0, (amount - self._amount_at(now)) / self._rate)

    def _amount_at(self, now: float) -> float:
        return min(self._most, self._amount + (now - self._time) * self._rate)


class RateBudgets:
    """The budgets of all keys that have one."""

    def __init__(self, budgets: Mapping[str, Budget]) -> None:
        """`budgets` by tenant."""
        self._budgets = dict(budgets)
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        now = time.monotonic()
        for tenant, budget in budgets.items():
            if budget.requests_per_minute is not None:
                self._requests[tenant] = _Bucket(budget.requests_per_minute, now)
            if budget.tokens_per_minute is not None:
                self._tokens[tenant] = _Bucket(budget.tokens_per_minute, now)

    def admit(self, tenant: str, now: float) -> None:
        """Count one request.

        Raises `OverloadedError` where the tenant has used up a budget, and counts nothing then.
        """
        requests, tokens = self._requests.get(tenant), self._tokens.get(tenant)
        if requests is not None and (wait_s := requests.seconds_until(1.0, now)):
            count = self._budgets[tenant].requests_per_minute
            raise _used_up(f"{count} requests", wait_s)
        if tokens is not None and (wait_s := tokens.seconds_until(1.0, now)):
            count = self._budgets[tenant].tokens_per_minute
            raise _used_up(f"{count} tokens", wait_s)
        if requests is not None:
            requests.take(1.0, now)

    def charge(self, tenant: str, num_tokens: int, now: float) -> None:
        """Count tokens that were used."""
        if (tokens := self._tokens.get(tenant)) is not None:
            tokens.take(num_tokens, now)


@dataclass(frozen=True, slots=True)
class Account:
    """The budgets as one request sees them."""

    budgets: RateBudgets
    tenant: str

    def open(self) -> None:
        """The request begins. Raises `OverloadedError` where its key's budget is used up."""
        self.budgets.admit(self.tenant, time.monotonic())

    def settle(self, num_tokens: int) -> None:
        """The request is over."""
        self.budgets.charge(self.tenant, num_tokens, time.monotonic())


def _used_up(what: str, wait_s: float) -> OverloadedError:
    return OverloadedError(
        f"this key's budget of {what} a minute is used up; try again in {wait_s:.1f} s",
        retry_after_s=wait_s,
    )
