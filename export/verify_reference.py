"""What a folder is held to: hashes of its tensors, its configuration, and what the original said.

Every export leaves two files in the folder that it writes. `reference.json` has a sha256 for each
tensor, `config.json` as it was, and the ids of some texts; `reference.logits` the logits that
the original's training forward gave at places of them. So a folder can be verified alone, and a
tensor that was changed is named even if the manifest was rewritten.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.durable import write_json
from llmserve.errors import CheckpointError
from llmserve.model.attention import DenseCache
from llmserve.model.weights import load_model
from llmserve.quant.dtypes import Float32Array, StoredArray
from llmserve.strict_json import read_json
from llmserve.tensor_file import map_tensors, write_tensors

from .block_stream import BlockStream
from .certificate import LayerError
from .evaluation_text import EVALUATION_FILE, read_evaluation_text

__all__ = [
    "EVALUATION_TEXT",
    "OWN_TEXT",
    "REFERENCE_FILE",
    "Reference",
    "as_reference",
    "changed_tensors",
    "changes",
    "make_reference",
    "read_reference",
    "reference_values",
    "reference_windows",
    "write_logits",
    "write_reference",
]

REFERENCE_FILE = "reference.json"
EVALUATION_TEXT = "the model's evaluation text"
OWN_TEXT = "text that the original wrote"
"""Where the folder has no other."""

# In the format of safetensors, but not named so: vLLM takes every `*.safetensors` for weights.
_LOGITS_FILE = "reference.logits"
_FORMAT = "llmserve-reference-1"
_NUM_WINDOWS = 8
_WINDOW = 64  # tokens
_MAX_LOGIT_BYTES = 8 << 20
_SEED = 1618


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The original's predictions at some places of some texts."""

    source: str
    """Fingerprint of the original's folder."""
    source_weight_bytes: int
    origin: str
    """What the texts are: `EVALUATION_TEXT` or `OWN_TEXT`."""
    windows: list[list[int]]
    """Token ids; none for a model that writes no text."""
    places: list[list[int]]
    """For each window, the places whose logits are kept, ascending."""
    logits: list[Float32Array]
    """For each window, [places, vocabulary]."""
    perplexity: float
    """Of the original on the windows."""
    accepted_kl: float
    layers: tuple[LayerError, ...]
    """How far the blocks of the folder's weights are from the original's, in float32."""


def make_reference(
    source: Checkpoint, original: BlockStream, windows: list[list[int]], origin: str,
    *,
    accepted_kl: float, layers: tuple[LayerError, ...],
) -> Reference:  # fmt: skip
    """Ask the original.

    Args:
        source: the original's folder.
        original: it, with `windows` at the end of their way.
        windows: as `reference_windows` gave them, and `origin` too.
        origin: what they are.
        accepted_kl: as the certificate is to say.
        layers: likewise.
    """
    places = _places(windows, source.config.vocab_size)
    kept, losses = [], []
    logits_of = original.logits() if windows else iter(())
    for window, wanted, logits in zip(windows, places, logits_of, strict=True):
        targets = torch.tensor(window[1:])
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], targets).item())
        kept.append(logits[wanted].numpy())
    return Reference(
        source=source.fingerprint,
        source_weight_bytes=source.stored_bytes(),
        origin=origin,
        windows=windows,
        places=places,
        logits=kept,
        perplexity=_perplexity(windows, losses),
        accepted_kl=accepted_kl,
        layers=layers,
    )


def _perplexity(windows: list[list[int]], losses: list[float]) -> float:
    counts = [len(window) - 1 for window in windows]
    return float(np.exp(np.average(losses, weights=counts))) if windows else 1.0


def reference_windows(source: Checkpoint) -> tuple[str, list[list[int]]]:
    """What is read, and its ids: the evaluation text, or what the original writes itself.

    To write, the original is whole in memory for a while, in the type of its weights.
    """
    path, config = source.path, source.config
    if config.head is not None:
        return "nothing: the model writes no text", []
    length = min(_WINDOW, config.max_seq_len)
    if (path / EVALUATION_FILE).is_file():
        text = read_evaluation_text(path, config, None, max_tokens=_NUM_WINDOWS * 512)
        cut = [window[:length] for window in text.windows[:_NUM_WINDOWS]]
        return EVALUATION_TEXT, [window for window in cut if len(window) > 1]
    return OWN_TEXT, _written(source, length)


@torch.inference_mode()
def _written(source: Checkpoint, length: int) -> list[list[int]]:
    """Texts that the model writes, drawn from its own predictions. Random ids would ask it only
    about what it never met."""
    model, config = load_model(source), source.config
    random = torch.Generator().manual_seed(_SEED)
    first = torch.randint(config.vocab_size, (_NUM_WINDOWS, 1), generator=random)
    if config.bos_token_id is not None:
        first.fill_(config.bos_token_id)
    dtype = model.embed_tokens.weight.dtype
    cache = DenseCache(config, batch_size=_NUM_WINDOWS, max_len=length, dtype=dtype)
    ids = first
    for place in range(length - 1):
        hidden = model.hidden(ids[:, -1:], torch.tensor([place]), cache)
        weights = model.logits(hidden[:, -1]).double().softmax(-1)
        ids = torch.cat([ids, weights.multinomial(1, generator=random)], dim=1)
    windows: list[list[int]] = ids.tolist()
    return windows


def _places(windows: list[list[int]], vocab_size: int) -> list[list[int]]:
    """As many places as fit, evenly over each window; the last always."""
    most = _MAX_LOGIT_BYTES // (4 * vocab_size * max(1, len(windows)))
    return [
        sorted({int(place) for place in np.linspace(len(window) - 1, 0, min(most, len(window)))})
        if most > 1
        else [len(window) - 1]
        for window in windows
    ]


def write_reference(folder: Path, reference: Reference) -> None:
    """Write both files into a folder that is otherwise complete. Raises `OSError`."""
    values = {
        "format": _FORMAT,
        **reference_values(reference),
        "config": read_json(folder / "config.json"),
        "tensors": _hashes(folder),
    }
    write_json(folder / REFERENCE_FILE, values)
    write_logits(folder / _LOGITS_FILE, reference)


def reference_values(reference: Reference) -> dict[str, Any]:
    """Everything but the logits, as JSON holds it."""
    return {
        "source": reference.source,
        "source_weight_bytes": reference.source_weight_bytes,
        "origin": reference.origin,
        "perplexity": reference.perplexity,
        "accepted_kl": reference.accepted_kl,
        "layers": {layer.name: layer.relative_error for layer in reference.layers},
        "windows": reference.windows,
        "places": reference.places,
    }


def write_logits(path: Path, reference: Reference) -> None:
    """Write the logits as a safetensors file; nothing where there are none. Raises `OSError`."""
    logits = {f"logits.{i}": StoredArray("float32", v) for i, v in enumerate(reference.logits)}
    if logits:
        write_tensors(path, logits)


def read_reference(folder: Path) -> Reference | None:
    """What an export left in the folder; None where it left nothing.

    Raises `CheckpointError` for files that are damaged.
    """
    path = folder / REFERENCE_FILE
    return as_reference(read_json(path), path, folder / _LOGITS_FILE) if path.is_file() else None


def as_reference(values: dict[str, Any], path: Path, logits_path: Path) -> Reference:
    """A reference from `reference_values`, which the file `path` holds, and its logits.

    Raises `CheckpointError` for files that are damaged.
    """
    try:
        arrays = map_tensors(logits_path) if values["windows"] else {}
        logits = [arrays[f"logits.{index}"].data for index in range(len(values["windows"]))]
        return Reference(
            source=values["source"],
            source_weight_bytes=values["source_weight_bytes"],
            origin=values["origin"],
            windows=values["windows"],
            places=values["places"],
            logits=logits,
            perplexity=values["perplexity"],
            accepted_kl=values["accepted_kl"],
            layers=tuple(
                LayerError(name=name, relative_error=error)
                for name, error in values["layers"].items()
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}") from error


def changes(folder: Path) -> list[str]:
    """What is not as the export left it: tensors by name, settings of `config.json` by key.

    Raises `CheckpointError` where a file cannot be read at all.
    """
    recorded = read_json(folder / REFERENCE_FILE)
    lines = changed_tensors(recorded["tensors"], _hashes(folder))
    return lines + _config_changes(recorded["config"], read_json(folder / "config.json"), "")


def changed_tensors(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """Tensors that came, went or changed, by name; both are name → hash."""
    return [
        f"tensor {name}: {'changed' if name in found else 'missing'}"
        if name in recorded
        else f"tensor {name}: was not there"
        for name in sorted(recorded.keys() | found.keys())
        if recorded.get(name) != found.get(name)
    ]


def _config_changes(before: dict[str, Any], now: dict[str, Any], prefix: str) -> list[str]:
    lines: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _config_changes(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"config.json: {prefix}{key} was {old!r}, is {new!r}")
    return lines


def _hashes(folder: Path) -> dict[str, str]:
    """Stored name → sha256 of type, shape and bytes, of every tensor of the folder."""
    tensors = Checkpoint.open(folder, verify=False).stored_tensors()
    if not tensors:
        from .onnx_files import graph_tensors  # a folder of weights needs no onnx

        tensors = graph_tensors(folder)
    return {name: _sha256(array) for name, array in sorted(tensors.items())}


def _sha256(array: StoredArray) -> str:
    digest = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    digest.update(np.ascontiguousarray(array.data).data)
    return digest.hexdigest()
