"""Weighted fairness between tenants: the virtual token counter of Sheng et al. 2024
(arXiv:2401.00588, section 4.1).

Each tenant has a counter of the tokens it was served, divided by its weight; the waiting tenant
with the lowest counter is admitted next. A tenant that comes back from idleness is lifted to the
lowest counter among those waiting: what it did not use is not saved up. So two tenants that always
have requests waiting get tokens in the proportion of their weights, up to one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .policy import Policy
from .policy_priority import PriorityPolicy
from .running import SortKey
from .sequence import Sequence

__all__ = ["FairPolicy"]

MAX_IDLE_TENANTS = 4096
"""Counters of tenants without waiting sequences that are remembered."""


class FairPolicy(Policy):
    """Tenants by served tokens; within one, priority and arrival."""

    charges = True

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` are shares by tenant, above 0; one that is not named weighs 1."""
        self._weights = weights
        self._served: dict[str, float] = {}
        self._queues: dict[str, PriorityPolicy] = {}  # of tenants with waiting sequences
        self._order = PriorityPolicy()
        self._last_lowest = 0.0

    def sort_key(self, sequence: Sequence) -> SortKey:
        """Priority, then arrival: fairness is a matter of admission."""
        return self._order.sort_key(sequence)

    def add(self, sequence: Sequence) -> None:
        """O(tenants waiting) when the tenant had none waiting, else O(log waiting)."""
        tenant = sequence.request.tenant
        if tenant not in self._queues:
            self._lift(tenant)
            self._queues[tenant] = PriorityPolicy()
        self._queues[tenant].add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """O(log waiting)."""
        tenant = sequence.request.tenant
        self._last_lowest = self._lowest()
        self._queues[tenant].remove(sequence)
        if not len(self._queues[tenant]):
            del self._queues[tenant]
            self._forget_idle()

    def peek(self) -> Sequence | None:
        """The first of the tenant that was served least. O(tenants waiting)."""
        if not self._queues:
            return None
        tenant = min(self._queues, key=lambda name: (self._served[name], name))
        return self._queues[tenant].peek()

    def charge(self, tokens_by_tenant: Mapping[str, float]) -> None:
        """Add what was served, by weight."""
        for tenant, tokens in tokens_by_tenant.items():
            share = tokens / self._weights.get(tenant, 1.0)
            self._served[tenant] = self._served.get(tenant, self._last_lowest) + share

    def __iter__(self) -> Iterator[Sequence]:
        waiting = [sequence for queue in self._queues.values() for sequence in queue]
        return iter(sorted(waiting, key=self.sort_key))

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def _lowest(self) -> float:
        return min((self._served[tenant] for tenant in self._queues), default=self._last_lowest)

    def _lift(self, tenant: str) -> None:
        lowest = self._lowest()
        self._served[tenant] = max(self._served.get(tenant, lowest), lowest)

    def _forget_idle(self) -> None:
        """Keep memory bounded: the least served of the idle tenants are lifted anyway."""
        idle = self._served.keys() - self._queues.keys()
        if len(idle) > MAX_IDLE_TENANTS:
            for tenant in sorted(idle, key=self._served.__getitem__)[: len(idle) // 2]:
                del self._served[tenant]
