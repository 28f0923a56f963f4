"""Policies by name."""

from __future__ import annotations

from .config import EngineConfig
from .policy import Policy
from .policy_fair import FairPolicy
from .policy_fcfs import FcfsPolicy
from .policy_priority import PriorityPolicy

__all__ = ["make_policy"]


def make_policy(config: EngineConfig) -> Policy:
    """The empty waiting queue of the policy that `config` names."""
    if config.policy == "fair":
        return FairPolicy(config.tenant_weights)
    return PriorityPolicy() if config.policy == "priority" else FcfsPolicy()
