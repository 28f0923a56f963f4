"""One model on two processes, as users have it: `LLM`, and a server whose ranks are killed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llmserve.errors import EngineError
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams
from support.models import make_model_folder
from support.serving import metric, post, serving

PROMPTS = ["Once upon a time", "One day she saw a big dog", [5, 6, 7] * 20]
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SERVED = ("--runner", "torch", "--tensor-parallel-size", "2", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


def wait_until(is_so: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """The ranks beside rank 0, whose process this is."""
    found = process.children(recursive=True)
    return [one for one in found if "llmserve.runners.torch_rank" in one.cmdline()]


def test_two_processes_generate_what_one_does_until_one_is_killed(folder: Path) -> None:
    with LLM(folder, runner="torch") as llm:
        wanted = [one.choices[0].token_ids for one in llm.generate(PROMPTS, PARAMS)]
    with LLM(folder, tensor_parallel_size=2) as llm:
        assert llm.info.runner == "torch"
        assert llm.info.executed_form == "float32 on 2 ranks"
        (rank,) = ranks_of(psutil.Process())
        assert [one.choices[0].token_ids for one in llm.generate(PROMPTS, PARAMS)] == wanted
        started = time.monotonic()
        threading.Timer(0.2, rank.kill).start()
        with pytest.raises(EngineError, match="rank 1 ended: by signal 9"):
            generate_for_ever(llm)
        assert time.monotonic() - started < 10
    wait_until(lambda: is_gone(rank))


def generate_for_ever(llm: LLM) -> None:
    while True:
        llm.generate(PROMPTS, PARAMS)


@pytest.mark.http
@pytest.mark.slow
def test_a_killed_rank_costs_a_pause_and_a_killed_server_leaves_no_process(folder: Path) -> None:
    body: dict[str, object] = {
        "prompt": "Once upon a time", "max_tokens": 220, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    with serving(folder, *SERVED) as server:
        url = server.wait_until_ready()
        wanted = choice(url, body)
        (rank,) = ranks_of(server.engine())
        found: list[object] = []
        asking = threading.Thread(target=lambda: found.append(choice(url, body)))
        asking.start()
        wait_until(lambda: metric(url, "llmserve_num_requests_running") > 0)
        rank.kill()
        asking.join(40)
        assert found == [wanted]
        assert metric(url, "llmserve_engine_restarts_total") == 1
        processes = server.process_tree()
        assert len(ranks_of(server.engine())) == 1
        server.process.kill()
        for process in processes:
            wait_until(lambda process=process: is_gone(process))


def choice(url: str, body: dict[str, object]) -> object:
    status, data = post(url, body, timeout=60)
    assert status == 200, data
    return json.loads(data)["choices"]
