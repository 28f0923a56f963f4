from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmserve.benchmarks.noise import LagMeter, NoiseMeter, cpu_shares, warnings_of


def test_shares_are_of_the_time_between() -> None:
    """user, nice, system, idle, iowait, irq, softirq, steal."""
    before = [100, 0, 50, 1000, 10, 0, 0, 5]
    after = [130, 0, 60, 1040, 20, 0, 0, 15]
    assert cpu_shares(before, after) == pytest.approx((40.0, 10.0))
    assert cpu_shares(before, before) == (None, None)


def test_lag_is_what_the_loop_wakes_late() -> None:
    now, delays = 0.0, iter([0.0, 0.5, 0.25])

    async def sleep(seconds: float) -> None:
        nonlocal now
        delay = next(delays, None)
        if delay is None:
            raise asyncio.CancelledError
        now += seconds + delay

    meter = LagMeter(clock=lambda: now, sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(meter.run())
    assert meter.lags_s == pytest.approx([0.0, 0.5, 0.25])


def test_report_tells_what_the_client_cost() -> None:
    meter = NoiseMeter()
    meter.lag.lags_s += [0.001] * 99 + [0.2]
    while sum(range(1000)) and meter.report()["client_cpu_percent"] == 0.0:
        pass
    report = meter.report()
    assert report["client_lag_max_ms"] == pytest.approx(200.0)
    assert isinstance(report["client_cpu_percent"], float)
    assert report["client_cpu_percent"] > 0


@pytest.mark.parametrize(
    ("lag_ms", "cpu", "steal", "words"),
    [
        (1.0, 50.0, 0.0, []),
        (1.0, 50.0, None, []),
        (40.0, 99.0, None, ["the client was a bottleneck: it ran 40 ms late"]),
        (40.0, 9.0, None, ["waited for a processor that others had: it ran 40 ms late"]),
        (1.0, 95.0, None, ["95 % of one core"]),
        (1.0, 50.0, 7.5, ["7.5 %"]),
        (40.0, 50.0, 7.5, ["40 ms late", "7.5 %"]),
    ],
)
def test_warnings_name_what_was_too_much(
    lag_ms: float, cpu: float, steal: float | None, words: list[str]
) -> None:
    noise = {"client_lag_p99_ms": lag_ms, "client_cpu_percent": cpu, "steal_percent": steal}
    found = list(warnings_of(noise))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_systems_without_proc_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, encoding: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    report = NoiseMeter().report()
    assert (report["busy_percent"], report["cpu_mhz"]) == (None, None)
