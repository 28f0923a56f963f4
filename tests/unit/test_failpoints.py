"""Failpoints fire when their turn comes, and at no other time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmserve import failpoints
from llmserve.errors import ConfigError
from llmserve.failpoints import FailpointError


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


def test_unarmed_hit_does_nothing() -> None:
    failpoints.hit("ckpt.write")
    assert not failpoints.is_armed("ckpt.write")


def test_raise_fires_at_every_hit() -> None:
    failpoints.arm("ckpt.write=raise")
    for _ in range(3):
        with pytest.raises(FailpointError, match=r"ckpt\.write"):
            failpoints.hit("ckpt.write")
    failpoints.hit("ckpt.rename")


def test_nth_hit_alone_fires() -> None:
    failpoints.arm("a.b=raise@3, c.d=enospc")
    failpoints.hit("a.b")
    failpoints.hit("a.b")
    with pytest.raises(FailpointError, match="hit 3"):
        failpoints.hit("a.b")
    failpoints.hit("a.b")
    assert failpoints.is_armed("c.d")


def test_enospc_is_the_error_of_a_full_disk() -> None:
    failpoints.arm("ckpt.write=enospc")
    with pytest.raises(OSError, match="No space left") as caught:
        failpoints.hit("ckpt.write")
    assert caught.value.errno == errno.ENOSPC


def test_arming_and_firing_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    failpoints.arm("x.y=raise")
    with pytest.raises(FailpointError):
        failpoints.hit("x.y")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["failpoint armed: x.y=raise", "failpoint x.y fires: raise at hit 1"]


@pytest.mark.parametrize("spec", ["a", "a=", "a=explode", "a=raise@0", "a=raise@-1", "A=raise"])
def test_bad_spec_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="failpoint"):
        failpoints.arm(spec)


@pytest.mark.parametrize(
    ("action", "number"), [("kill", signal.SIGKILL), ("abort", signal.SIGABRT)]
)
def test_environment_arms_and_the_process_ends(action: str, number: signal.Signals) -> None:
    code = (
        "from llmserve import failpoints as f; f.hit('a.b'); print('one', flush=True); f.hit('a.b')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, failpoints.VARIABLE: f"a.b={action}@2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "one\n"
    assert result.returncode == -number


def test_hang_never_returns() -> None:
    code = "from llmserve import failpoints as f; print('one', flush=True); f.hit('a.b'); print(2)"
    environment = {**os.environ, failpoints.VARIABLE: "a.b=hang"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"one\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()
        assert process.stdout.read() == b""
