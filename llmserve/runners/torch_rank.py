"""A rank of a model beside rank 0: a process that computes what it is told to, in lock-step.

Started by `rank_processes.py` as `python -m llmserve.runners.torch_rank --fd N`, where N is its end
of a socket pair. It loads its part of the model, meets the others, and then takes one command after
another. It ends when its leader does, even in the midst of a collective.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from ..adapters import load_adapter
from ..checkpoint import Checkpoint
from ..errors import EngineError, LLMServeError
from .rank_messages import (
    Allocate,
    Command,
    Failed,
    Load,
    Loaded,
    Logits,
    Meet,
    RankEvent,
    Step,
    StreamEndError,
    batch_of,
    encode,
    receive_command,
)
from .rank_processes import when_closed
from .tensor_parallel import Rank
from .torch_rank_runner import RankRunner
from .torch_runner import use_threads

__all__ = ["main", "serve_rank"]

_log = logging.getLogger("llmserve.engine")


def serve_rank(connection: socket.socket) -> int:
    """Be a rank until rank 0 leaves; returns the exit code of the process."""
    try:
        _serve(connection)
    except StreamEndError:
        return 0
    except LLMServeError as error:
        _tell(connection, Failed(str(error)))
    except Exception as error:
        _log.exception("a rank failed")
        _tell(connection, Failed(f"{type(error).__name__}: {error}"))
    return 1


def _serve(connection: socket.socket) -> None:
    load = receive_command(connection)
    if not isinstance(load, Load):
        raise EngineError(f"a Load is due, not a {type(load).__name__}")
    runner = _load(load)
    with contextlib.closing(runner):
        _tell(connection, Loaded(runner.fingerprint, runner.info.weight_bytes))
        while True:
            _obey(runner, receive_command(connection))


def _load(load: Load) -> RankRunner:
    if load.device != "cpu":
        torch.cuda.set_device(load.device)  # Triton's kernels go to the current one
    use_threads(load.threads)
    return RankRunner(
        Checkpoint.open(load.folder, verify=False),  # rank 0 has what it was told to verify
        Rank(load.rank, load.count),
        dtype=load.dtype,
        cache_dtype=load.cache_dtype,
        device=load.device,
        adapters=[load_adapter(name, Path(path)) for name, path in load.adapters.items()],
    )


def _obey(runner: RankRunner, command: Command) -> None:
    match command:
        case Meet(meeting=meeting, timeout_s=timeout_s):
            runner.join(Path(meeting), timeout_s=timeout_s)
        case Allocate(num_blocks=num_blocks, block_size=block_size):
            runner.allocate_cache(num_blocks, block_size)
        case Step():
            runner.submit(batch_of(command))
            runner.collect()
        case Logits(num_rows=num_rows):
            runner.take_part_in_logits(num_rows)
        case Load():
            raise EngineError("a second Load came")


def _tell(connection: socket.socket, event: RankEvent) -> None:
    with contextlib.suppress(OSError):  # nobody is left to be told
        connection.sendall(encode(event))


def main(argv: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = argparse.ArgumentParser(description="A rank of a model; started by rank 0.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to rank 0")
    # Rank 0 decides: it may have requests to end, and the end of its stream ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=parser.parse_args(argv).fd) as connection:
        when_closed([connection], lambda: os._exit(0))
        code = serve_rank(connection)
    return code


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stderr.flush()
    # Without the interpreter's own end: threads of gloo and NCCL may outlive what they work on.
    os._exit(status)
