"""The load generator against a server that only streams."""

from __future__ import annotations

import pytest

from llmserve.benchmarks.client_speed import ClientSpeedOptions, measure_client

pytestmark = pytest.mark.http


def test_every_token_of_the_paced_server_is_taken() -> None:
    options = ClientSpeedOptions(num_streams=8, output_len=16, seconds=0.2)
    speed = measure_client(options, 4000.0)
    assert speed.failed == 0
    assert 0 < speed.taken_rate < 1.5 * 4000
    assert speed.cpu_percent > 0
