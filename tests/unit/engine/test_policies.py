"""Who is served next, policy by policy."""

from __future__ import annotations

from collections import Counter

import pytest

from llmserve.engine.block_keys import BlockKeys
from llmserve.engine.policies import make_policy
from llmserve.engine.policy import Policy
from llmserve.engine.policy_fair import FairPolicy
from llmserve.engine.policy_fcfs import FcfsPolicy
from llmserve.engine.policy_priority import PriorityPolicy
from llmserve.engine.sequence import Sequence
from support.engines import make_config, make_request


def make_sequence(uid: int, **changes: object) -> Sequence:
    request = make_request(f"r{uid}", [1], **changes)
    return Sequence(
        request=request,
        choice_index=0,
        uid=uid,
        token_ids=[1],
        max_len=8,
        stop_token_ids=frozenset(),
        block_keys=BlockKeys(b"", request, [1], 4),
    )


def drain(policy: Policy) -> list[int]:
    order = []
    while (sequence := policy.peek()) is not None:
        policy.remove(sequence)
        order.append(sequence.uid)
    return order


def test_fcfs_goes_by_arrival_and_then_by_creation() -> None:
    policy = FcfsPolicy()
    for uid, time in ((1, 2.0), (2, 1.0), (4, 1.0), (3, 1.0)):
        policy.add(make_sequence(uid, arrival_time=time, priority=-uid))
    assert [sequence.uid for sequence in policy] == [2, 3, 4, 1]
    assert drain(policy) == [2, 3, 4, 1]
    assert len(policy) == 0


def test_priority_goes_before_arrival() -> None:
    policy = PriorityPolicy()
    for uid, priority in ((1, 5), (2, 0), (3, -1), (4, 0)):
        policy.add(make_sequence(uid, priority=priority))
    assert drain(policy) == [3, 2, 4, 1]


@pytest.mark.parametrize("weights", [{}, {"heavy": 3.0}])
def test_fair_serves_waiting_tenants_in_the_proportion_of_their_weights(
    weights: dict[str, float],
) -> None:
    policy = FairPolicy(weights)
    for uid in range(300):  # one tenant asks a lot and first, the other little and later
        policy.add(make_sequence(uid, tenant="heavy"))
    for uid in range(300, 400):
        policy.add(make_sequence(uid, tenant="light"))
    served: Counter[str] = Counter()
    for _ in range(100):
        sequence = policy.peek()
        assert sequence is not None
        policy.remove(sequence)
        served[sequence.request.tenant] += 1
        policy.charge({sequence.request.tenant: 10.0})
    assert served["heavy"] == pytest.approx(75 if weights else 50, abs=1)


def test_idle_tenant_does_not_save_up() -> None:
    policy = FairPolicy({})
    for uid in range(20):
        policy.add(make_sequence(uid, tenant="busy"))
    for _ in range(10):
        busy = policy.peek()
        assert busy is not None
        policy.remove(busy)
        policy.charge({"busy": 100.0})
    for uid in range(20, 40):
        policy.add(make_sequence(uid, tenant="late"))
    served = []
    for _ in range(10):
        sequence = policy.peek()
        assert sequence is not None
        policy.remove(sequence)
        served.append(sequence.request.tenant)
        policy.charge({sequence.request.tenant: 100.0})
    assert Counter(served) == {"late": 5, "busy": 5}


def test_fair_keeps_arrival_order_within_a_tenant() -> None:
    policy = FairPolicy({})
    for uid, time in ((1, 3.0), (2, 1.0), (3, 2.0)):
        policy.add(make_sequence(uid, arrival_time=time, tenant="a"))
    assert drain(policy) == [2, 3, 1]


def test_policies_are_known_by_name() -> None:
    kinds = {
        name: type(make_policy(make_config(policy=name))) for name in ("fcfs", "priority", "fair")
    }
    assert kinds == {"fcfs": FcfsPolicy, "priority": PriorityPolicy, "fair": FairPolicy}
