"""Finished blocks of a quantization that was interrupted, beside the folder that it will become.

`.NAME.partial` holds `plan.json`, which names everything that the result depends on, and a
safetensors file for each finished block, or a JSON file for each thing that a search measured.
Another plan under the same name begins anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmserve.durable import remove, write_json
from llmserve.errors import CheckpointError
from llmserve.quant.config import QuantizationConfig
from llmserve.quant.dtypes import StoredArray, from_float32, to_float32
from llmserve.quant.groups import QuantizedLinear
from llmserve.quant.layout import config_of, decode_layer, encode_layer
from llmserve.strict_json import read_json
from llmserve.tensor_file import map_tensors, read_metadata, write_tensors

from .quant_block import QuantizedBlock

__all__ = ["BlockStore"]

_PLAN = "plan.json"
_CHANGED = "changed."


class BlockStore:
    """Blocks on disk, by index, and figures, by name."""

    def __init__(self, target: Path, plan: dict[str, Any]) -> None:
        """Open the store of the folder `target`; what another plan left there goes.

        Raises `OSError` if the disk cannot be written.
        """
        self._folder = target.absolute().with_name(f".{target.absolute().name}.partial")
        if not self._has(plan):
            remove(self._folder)
            self._folder.mkdir(parents=True)
            write_json(self._folder / _PLAN, plan)

    def read(self, index: int) -> QuantizedBlock | None:
        """The block, if it was finished."""
        path = self._path(index)
        if not path.is_file():
            return None
        tensors = map_tensors(path)
        values = json.loads(read_metadata(path)["quantization"])
        layers: dict[str, QuantizedLinear] = {}
        if values["config"] is not None:
            config = QuantizationConfig.parse(values["config"])
            for name, shape in values["shapes"].items():
                linear = decode_layer(config, name, (shape[0], shape[1]), tensors)
                assert isinstance(linear, QuantizedLinear), "a block of another format"
                layers[name] = linear
        changed = {
            name.removeprefix(_CHANGED): to_float32(array)
            for name, array in tensors.items()
            if name.startswith(_CHANGED)
        }
        return QuantizedBlock(layers=layers, changed=changed, methods=values["methods"])

    def write(self, index: int, block: QuantizedBlock) -> None:
        """Keep a finished block. Raises `OSError`."""
        tensors: dict[str, StoredArray] = {}
        for name, linear in block.layers.items():
            tensors |= encode_layer(name, linear)
        for name, values in block.changed.items():
            tensors[f"{_CHANGED}{name}"] = from_float32(values, "float32")
        described = {
            "config": config_of(block.layers, ()).render() if block.layers else None,
            "methods": dict(block.methods),
            "shapes": {name: list(linear.shape) for name, linear in block.layers.items()},
        }
        write_tensors(self._path(index), tensors, {"quantization": json.dumps(described)})

    def read_figures(self, name: str) -> Any:
        """What was kept under that name; None: nothing."""
        path = self._folder / f"{name}.json"
        return read_json(path)["figures"] if path.is_file() else None

    def write_figures(self, name: str, figures: Any) -> None:
        """Keep what JSON can hold; floats come back as they were. Raises `OSError`."""
        write_json(self._folder / f"{name}.json", {"figures": figures})

    def discard(self) -> None:
        """Remove the store: its folder is written."""
        remove(self._folder)

    def _path(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"

    def _has(self, plan: dict[str, Any]) -> bool:
        try:
            return bool(read_json(self._folder / _PLAN) == json.loads(json.dumps(plan)))
        except (OSError, CheckpointError):
            return False
