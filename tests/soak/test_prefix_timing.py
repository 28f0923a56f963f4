"""R25: whether the time to the first token tells what another key asked, isolated and not.

A classifier that sees times alone guesses, for many prompts of a victim, whether the prompt was
asked before. Its area under the ROC curve is about a half where tenants are apart, and near one
where they share the cache: so the test is known to bite. With 600 prompts of either kind chance
alone moves the area by 0.017 (one standard deviation).
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from llmserve.server.auth import Key, KeyRing, RouteScope
from support.models import make_model_folder
from support.servers import LocalServer, local_server

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

VICTIM, ATTACKER = "a-key-of-ann", "a-key-of-bob"
PROMPT_TOKENS = 512
ISOLATED = (0.45, 0.55)
SHARED = 0.9


def area(positive: list[float], negative: list[float]) -> float:
    """The probability that a positive's value is below a negative's, ties counting half."""
    pairs = [
        1.0 if low < high else 0.5 if low == high else 0.0 for low in positive for high in negative
    ]
    return sum(pairs) / len(pairs)


def first_token_s(server: LocalServer, key: str, prompt: list[int]) -> float:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    started = time.perf_counter()
    reply = server.post("/v1/completions", body, authorization=f"Bearer {key}")
    assert reply.status == 200
    return time.perf_counter() - started


def area_of(folder: Path, num_prompts: int, *, shares: bool) -> float:
    """How well times tell the victim's prompts from others, in an order drawn by lot."""
    generator = random.Random(int(os.environ.get("LLMSERVE_SOAK_SEED", "0")))
    prompts = [
        [generator.randrange(1, 320) for _ in range(PROMPT_TOKENS)] for _ in range(num_prompts)
    ]
    asked = set(generator.sample(range(num_prompts), num_prompts // 2))
    times: dict[bool, list[float]] = {True: [], False: []}
    keys = KeyRing([Key.of(secret, {RouteScope.USER}) for secret in (VICTIM, ATTACKER)])
    engine = {"runner": "torch", "threads": 1, "cache_bytes": 256 << 20, "max_seq_len": 1024}
    with local_server(folder, keys=keys, shares_prefix_cache=shares, engine=engine) as server:
        for _ in range(5):
            first_token_s(server, ATTACKER, [1] * PROMPT_TOKENS)  # the machine warms up
        for index, prompt in enumerate(prompts):
            if index in asked:
                first_token_s(server, VICTIM, prompt)
            else:  # the same work for the machine, so that nothing but the cache differs
                first_token_s(server, VICTIM, prompt[::-1])
            times[index in asked].append(first_token_s(server, ATTACKER, prompt))
    return area(times[True], times[False])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("timing") / "m", max_seq_len=1024)


def test_r25_times_tell_nothing_of_another_key(folder: Path) -> None:
    low, high = ISOLATED
    found = area_of(folder, 1200, shares=False)
    print(f"area under the curve, isolated: {found:.3f}")
    assert low <= found <= high


def test_r25_times_tell_all_where_the_cache_is_shared(folder: Path) -> None:
    found = area_of(folder, 200, shares=True)
    print(f"area under the curve, shared: {found:.3f}")
    assert found >= SHARED
