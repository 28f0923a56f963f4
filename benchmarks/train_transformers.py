"""`transformers.Trainer` as a contender in training speed, in an interpreter that has it.

Runs there without llmserve: nothing of it is imported. It needs transformers and accelerate.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import transformers

__all__ = ["main", "train"]


class _Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of a token file, cut at multiples of the context."""

    def __init__(self, path: str, context: int) -> None:
        self._ids = np.memmap(path, dtype="<u2", mode="r")
        self._context = context

    def __len__(self) -> int:
        return (len(self._ids) - 1) // self._context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._ids[index * self._context : (index + 1) * self._context]
        ids = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class _Clock(transformers.TrainerCallback):
    """Notes when each step begins, and the end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        """A step begins."""
        self.times.append(time.perf_counter())

    def on_train_end(self, *arguments: Any, **named: Any) -> None:
        """The last one has ended."""
        self.times.append(time.perf_counter())


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train from fresh weights; tokens per second of the steps after the first few.

    Args:
        settings: The fields of `train_speed.Job`.
    """
    torch.set_num_threads(settings["threads"])
    config: Any = transformers.AutoConfig.from_pretrained(settings["model"])
    models: Any = transformers.AutoModelForCausalLM
    model = models.from_config(config, dtype=torch.float32)
    context, rows, clock = config.max_position_embeddings, settings["batch_size"], _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=rows,
            learning_rate=1e-3,
            adam_beta2=0.95,
            bf16=settings["precision"] == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer: Any = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=_Windows(settings["tokens"], context),
            callbacks=[clock],
        )
        trainer.train()
    counted = clock.times[settings["untimed_steps"] :]
    seconds = counted[-1] - counted[0]
    return {
        "tokens_per_s": (len(counted) - 1) * rows * context / seconds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    """Read the settings from the command line and print the figures as the last line."""
    print(json.dumps(train(json.loads(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
