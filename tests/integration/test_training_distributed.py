"""Two processes make the run that one makes: started by torchrun, and as torchrun does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import psutil
import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.training.distributed import ALONE, Processes
from llmserve.training.log import read_log
from llmserve.training.recipe import TrainingRecipe
from llmserve.training.run_folder import RunFolder
from llmserve.training.training_run import run_training
from support.training_runs import SilentReporter, run_as_processes, tiny_recipe, write_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    train(text, out, recipe("ddp"))
    return losses(out)


def recipe(parallel: str) -> TrainingRecipe:
    return tiny_recipe(parallel=parallel, packing="documents", ema_decay=0.9, log_every=1)


def train(text: Path, out: Path, settings: TrainingRecipe, processes: Processes = ALONE) -> None:
    run_training(settings, [str(text)], out, reporter=SilentReporter(), processes=processes)


def command_for_two(text: Path, out: Path, settings: TrainingRecipe) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "llmserve", "train", "--text", str(text), "--out", str(out)]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None and not isinstance(value, bool):
            command += ["--" + field.name.replace("_", "-"), str(value)]
    return command


def train_in_two(
    text: Path, out: Path, settings: TrainingRecipe
) -> subprocess.CompletedProcess[str]:
    command = command_for_two(text, out, settings)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def wait_until(is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s, "not within a minute"
        time.sleep(0.02)


def losses(out: Path) -> list[float]:
    """Training and held-out losses in the order of the log."""
    lines = read_log(out / "training_log.jsonl")
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


def test_copies_that_share_a_batch_make_the_run_of_one(
    text: Path, tmp_path: Path, alone: list[float]
) -> None:
    result = train_in_two(text, tmp_path / "run", recipe("ddp"))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
    assert "2 processes" in result.stderr
    assert result.stdout.count("held-out loss") == 1  # one of them speaks


def test_processes_end_at_a_checkpoint_when_torchrun_is_killed(text: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", replace(recipe("ddp"), steps=10**6, checkpoint_every=10**6)
    command = command_for_two(text, out, settings)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        log = out / "training_log.jsonl"
        wait_until(lambda: log.is_file() and len(read_log(log)) >= 3)
        workers = psutil.Process(parent.pid).children()
        parent.kill()
    assert len(workers) == 2
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    last = RunFolder(out).last_checkpoint()
    assert last is not None
    with RunFolder(out).locked():  # nobody has it any more
        assert read_log(log)[-1]["step"] >= 3


def test_shards_of_two_are_gone_on_with_by_one(
    text: Path, tmp_path: Path, alone: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    statuses = run_as_processes(
        2,
        lambda processes: train(text, out, recipe("fsdp"), processes),
        failpoint="train.micro_batch=raise@15",
    )
    assert all(statuses)
    assert losses(out)[:6] == pytest.approx(alone[:6], rel=1e-5)
    checkpoint = out / "checkpoints" / "step-00000004"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "manifest.json",
        "shard-00000-of-00002.safetensors",
        "shard-00001-of-00002.safetensors",
        "shards.json",
        "state.json",
    ]
    sizes = [path.stat().st_size for path in checkpoint.glob("shard-*.safetensors")]
    assert min(sizes) > 0.4 * max(sizes)
    train(text, out, recipe("fsdp"))
    assert "began with processes: 2; with 1" in caplog.text
    assert losses(out) == pytest.approx(alone, rel=1e-5)
    assert Checkpoint.open(out / "model").names()


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [({}, 3, "3 processes cannot share parts of 2"), ({"compile": True}, 2, "one process alone")],
)
def test_what_processes_cannot_share_is_refused(
    text: Path, tmp_path: Path, changes: dict[str, bool], count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_training(
            tiny_recipe(**changes),
            [str(text)],
            tmp_path / "run",
            reporter=SilentReporter(),
            processes=_Pretended(0, count),
        )


class _Pretended(Processes):
    """Several processes of which one exists."""

    __slots__ = ()

    def any(self, number: int) -> int:
        """Nobody to ask."""
        return number
