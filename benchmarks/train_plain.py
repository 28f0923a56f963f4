"""A plain training loop as a contender: random windows, one backward pass a step, torch's threads.

The loop of the tutorials (nanoGPT's shape), on this package's model: what `llmserve train` is
compared with. A process of its own: `python -m llmserve.benchmarks.train_plain '{...}'`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from llmserve.checkpoint import Checkpoint
from llmserve.model.transformer import Transformer

__all__ = ["main", "train"]


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train from fresh weights; tokens per second of the steps after the first few.

    Args:
        settings: The fields of `train_speed.Job`.
    """
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    config = Checkpoint.open(Path(settings["model"]), verify=False).config
    model = Transformer(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = np.memmap(settings["tokens"], dtype="<u2", mode="r")
    rows, context = settings["batch_size"], config.max_seq_len
    times = []
    for _ in range(settings["steps"]):
        times.append(time.perf_counter())
        starts = torch.randint(len(ids) - context - 1, (rows,)).tolist()
        windows = np.stack([ids[start : start + context + 1] for start in starts])
        tokens = torch.from_numpy(windows.astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bfloat16"):
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
    times.append(time.perf_counter())
    counted = times[settings["untimed_steps"] :]
    seconds = counted[-1] - counted[0]
    return {
        "tokens_per_s": (len(counted) - 1) * rows * context / seconds,
        "versions": {"torch": torch.__version__},
    }


def main() -> None:
    """Read the settings from the command line and print the figures as the last line."""
    print(json.dumps(train(json.loads(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
