"""LoRA adapters in PEFT's files."""

from __future__ import annotations

from pathlib import Path

from llmserve.adapters import save_adapter
from llmserve.config import ModelConfig
from support.adapters import random_adapter


def make_adapter_folder(folder: Path, config: ModelConfig, *, seed: int = 0) -> Path:
    """Write a random adapter for a model; returns its folder."""
    save_adapter(folder, random_adapter(config, seed=seed))
    return folder
