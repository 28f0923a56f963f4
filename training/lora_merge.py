"""An adapter added to the weights it adapts: one model that computes what both did together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmserve.adapters import Adapter, load_adapter
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.lineage import history_files
from llmserve.model.weights import to_stored

__all__ = ["merge_adapter", "merged"]


def merged(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Canonical float32 tensors with `scale · B A` added to every adapted weight."""
    result = dict(tensors)
    for place, pair in adapter.pairs.items():
        name = f"{place.module}.weight"
        # In float64: the sum is then rounded once, as the weight itself would be.
        added = torch.from_numpy(pair.b).double() @ torch.from_numpy(pair.a).double()
        result[name] = (result[name].double() + pair.scale * added).float()
    return result


def merge_adapter(
    model: Path,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model in `model` with an adapter merged into it as the folder `out`.

    Quantized layers are turned to floats first.

    Args:
        model: The model folder.
        adapter_folder: The adapter's folder, PEFT's or ours.
        out: The folder to write.
        dtype: Type of the merged weights; None: the model's own.
        overwrite: Replace a folder that is there; it stays until the new one is whole.

    Raises:
        CheckpointError: a folder is damaged, or the adapter does not fit the model.
        ConfigError: `out` exists and is not empty, and is not to be replaced.
    """
    checkpoint = Checkpoint.open(model)
    adapter = load_adapter("merged", adapter_folder)
    adapter.check(checkpoint.config)
    config = checkpoint.config
    if dtype is not None:
        config = replace(config, dtype=dtype)  # type: ignore[arg-type]  # it checks the value
    tensors = {name: torch.tensor(checkpoint.float32(name)) for name in checkpoint.names()}
    wanted = getattr(torch, config.dtype)
    stored = {name: to_stored(t.to(wanted)) for name, t in merged(tensors, adapter).items()}
    stage = {"source": checkpoint.fingerprint, "adapter": adapter.fingerprint}
    save_model(
        out,
        config,
        stored,
        copy_from=model,
        extra_files=history_files(model, "merge", stage),
        overwrite=overwrite,
    )
