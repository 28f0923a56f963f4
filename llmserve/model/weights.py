"""Between a model in torch and canonical tensors: loading, splitting what is fused, joining it.

Canonical names (`layouts.py`) are the model's own parameter names after `model.`, except that
query, key and value, and gate and input of the feed-forward, are one parameter each here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..quant.dtypes import NUMPY_DTYPES, StoredArray
from ..weight_source import WeightSource
from .transformer import Transformer

__all__ = [
    "canonical_parts",
    "canonical_tensors",
    "load_canonical",
    "load_model",
    "load_parameters",
    "to_stored",
]


def load_model(
    checkpoint: WeightSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    replace_layers: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """The model of an open folder, in evaluation mode; quantized layers are dequantized.

    Args:
        checkpoint: The folder.
        dtype: Type of weights and arithmetic; None: as the folder's configuration says.
        device: Where the weights go.
        replace_layers: Called with the model while its parameters have no values: it may put layers
            that have theirs in place of others. None: nothing is replaced.

    Raises:
        CheckpointError: a quantized layer is malformed.
    """
    config = checkpoint.config
    dtype = dtype or getattr(torch, config.dtype)
    with torch.device("meta"):
        model = Transformer(config)
    if replace_layers is not None:
        replace_layers(model)
    load_parameters(model, checkpoint, dtype=dtype, device=device)
    return model.eval()


def load_parameters(
    model: Transformer,
    checkpoint: WeightSource,
    prefix: str = "",
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Give those of the model's parameters whose names begin with `prefix` the folder's values.

    Others stay as they are: on the device `meta` they take no memory, so a model may be filled
    block by block. Raises as `load_model` does.
    """
    state = {}
    for name, old in model.named_parameters():
        if not name.startswith(prefix):
            continue
        parameter = torch.empty(old.shape, dtype=dtype, device=device)
        for part, rows in canonical_parts(name, len(parameter), model.config):
            parameter[rows] = _read(checkpoint, part).to(device)
        state[name] = parameter
    model.load_state_dict(state, strict=False, assign=True)


def canonical_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors by canonical name: detached views, which change when the model does."""
    return {
        part: parameter.detach()[rows]
        for name, parameter in model.named_parameters()
        for part, rows in canonical_parts(name, len(parameter), model.config)
    }


def load_canonical(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy canonical tensors into the model, in its own type and on its own device.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; nothing is copied then.
    """
    targets = canonical_tensors(model)
    wrong = targets.keys() ^ tensors.keys()
    wrong |= {name for name in targets.keys() - wrong if targets[name].shape != tensors[name].shape}
    if wrong:
        raise CheckpointError(
            f"tensors missing, unknown or of another shape than the model's: {sorted(wrong)[:4]}"
        )
    for name, target in targets.items():
        target.copy_(tensors[name])


def to_stored(tensor: Tensor) -> StoredArray:
    """A tensor as `checkpoint.save_model` takes it, its type kept."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return StoredArray(dtype, tensor.numpy().view(NUMPY_DTYPES[dtype]))


def canonical_parts(name: str, num_rows: int, config: ModelConfig) -> Iterator[tuple[str, slice]]:
    """The canonical tensors that the parameter `name` of `num_rows` joins, each with its rows."""
    joined = name.split(".")[-2]
    half = num_rows // 2
    sizes = {
        "qkv_proj": {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size},
        "gate_up_proj": {"gate_proj": half, "up_proj": half},
    }.get(joined)
    if sizes is None:
        has_prefix = not name.startswith(("lm_head.", "score.", "qa_outputs."))
        yield f"model.{name}" if has_prefix else name, slice(None)
        return
    start = 0
    for part, size in sizes.items():
        yield f"model.{name.replace(joined, part)}", slice(start, start + size)
        start += size


def _read(checkpoint: WeightSource, name: str) -> Tensor:
    if checkpoint.is_quantized(name):
        return torch.from_numpy(checkpoint.float32(name))
    stored = checkpoint.stored(name)
    tensor = torch.from_numpy(np.array(stored.data))  # torch takes no read-only views
    return tensor.view(torch.bfloat16) if stored.dtype == "bfloat16" else tensor
