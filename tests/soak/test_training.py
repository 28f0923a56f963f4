"""What takes a compiler or many starts: torch.compile itself, and kills by the clock."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmserve.training.log import read_log
from support.training_runs import SEPARATOR, write_text

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

TINY = [
    *("--vocab-size", "300", "--held-out", "0.1", "--hidden-size", "16", "--num-layers", "1"),
    *("--num-heads", "2", "--num-kv-heads", "1", "--intermediate-size", "24"),
    *("--max-seq-len", "16", "--batch-size", "4", "--accumulation", "2", "--warmup-steps", "2"),
    *("--precision", "float32", "--threads", "1"),
]


def command(out: Path, *options: str) -> list[str]:
    source = ["--text", str(out.parent / "text.txt"), "--separator", SEPARATOR, "--out", str(out)]
    return [sys.executable, "-m", "llmserve", "train", *source, "--quiet", *TINY, *options]


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_compiled_run_has_the_losses_of_a_plain_one(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    options = ["--steps", "6", "--log-every", "1", "--evaluate-every", "3"]
    losses = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        subprocess.run(command(tmp_path / name, *options, *more), check=True)
        log = read_log(tmp_path / name / "training_log.jsonl")
        losses.append([line.get("loss", line.get("held_out_loss")) for line in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def last_step(out: Path) -> int:
    """That of the last checkpoint; 0 before the first."""
    folders = (out / "checkpoints").glob("step-*")
    return max((int(folder.name.removeprefix("step-")) for folder in folders), default=0)


def wait_for_steps(process: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    """Until a run is so many steps further than now, by its checkpoints, or has ended."""
    wanted = last_step(out) + steps
    while process.poll() is None and last_step(out) < wanted:
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(2))
def test_r27_run_killed_by_the_clock_ends_with_the_same_weights(tmp_path: Path, seed: int) -> None:
    write_text(tmp_path / "text.txt")
    options = ["--steps", "4000", "--checkpoint-every", "50", "--dropout", "0.1"]
    subprocess.run(command(tmp_path / "whole", *options), check=True)
    choose = random.Random(seed)
    for life in range(10):
        process = subprocess.Popen(command(tmp_path / "killed", *options))
        if life % 2:  # some way on, so that the ten do not all die at their start
            wait_for_steps(process, tmp_path / "killed", choose.randrange(50, 500, 50))
            time.sleep(choose.uniform(0.0, 0.3))
        else:
            time.sleep(choose.uniform(0.5, 2.0))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"life {life} ended by itself"
    subprocess.run(command(tmp_path / "killed", *options), check=True)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
