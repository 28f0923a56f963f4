"""Every export there is, of a small model, for tests that let it fail at each file operation.

    python -m support.exports KIND MODEL OUT EVERY

kills a process at every EVERY-th operation of that export and checks what it leaves.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.durable import sweep_stale, verify_manifest
from llmserve.export import gguf_certificate, verify
from llmserve.export.dequantize import dequantize_folder
from llmserve.export.gguf import export_gguf
from llmserve.export.quant_options import Contract, QuantizationOptions
from llmserve.export.quantize import quantize_model
from llmserve.export.quantize_folder import quantize_folder
from support.models import make_model_folder

__all__ = ["EXPORTS", "check_left", "prepare_model"]

WINDOWS = ("a short text", [[1, 2, 3]])


def _quantize(model: Path, out: Path, **options: Any) -> None:
    options = {"measure": False, "calibration_tokens": 64, **options}
    quantize_folder(model, out, QuantizationOptions(**options))


def _contract(model: Path, out: Path) -> None:
    bounds = Contract(max_kl=10.0)
    quantize_folder(
        model, out, QuantizationOptions(contract=bounds, max_tokens=600, calibration_tokens=600)
    )


def _dequantize(model: Path, out: Path) -> None:
    dequantize_folder(model.with_name("small"), out)


def _onnx(model: Path, out: Path) -> None:
    from llmserve.export import export_onnx

    export_onnx._check = lambda *_: (None, 0.0)  # slow, and they write nothing
    export_onnx.check_files = lambda *_: None
    export_onnx.export_onnx(model, out)


def _gguf(model: Path, out: Path) -> None:
    export_gguf(model, out, kind="q8_0")


_INT4 = {"scheme": "int4", "group_size": 16}
EXPORTS: dict[str, Callable[[Path, Path], None]] = {
    "rtn": partial(_quantize, **_INT4),
    **{method: partial(_quantize, **_INT4, method=method)
       for method in ("mse", "gptq", "awq", "best")},
    "smoothquant": partial(_quantize, scheme="w8a8", method="smoothquant"),
    "kv-cache": partial(_quantize, scheme="int8", has_int8_cache=True),
    "nf4": partial(_quantize, scheme="nf4", double_quant=True),
    "bnb-int8": partial(_quantize, scheme="bnb-int8"),
    "contract": _contract,
    "dequantize": _dequantize,
    "gguf": _gguf,
    "onnx": _onnx,
}  # fmt: skip
"""Name → writes the export of a model folder. `dequantize` takes the folder `small` beside it."""


def prepare_model(folder: Path) -> Path:
    """A model with both texts, wide enough for bitsandbytes, and `small` beside it."""
    make_model_folder(folder, intermediate_size=64, hidden_size=64)
    text = "One day she saw a big dog, and the dog said hello. " * 24
    for name in ("evaluation.txt", "calibration.txt"):
        (folder / name).write_text(text)
    (folder / "manifest.json").unlink()
    source = Checkpoint.open(folder)
    tensors = quantize_model(source, "int4", 16).tensors(source)
    save_model(folder.with_name("small"), source.config, tensors, copy_from=folder)
    return folder


def check_left(out: Path) -> None:
    """Nothing lies under the name, or what was to be there, complete and verified."""
    if out.is_file():
        assert gguf_certificate.verify_gguf(out).findings == []
    elif out.exists():
        verify_manifest(out)
        checkpoint = Checkpoint.open(out)
        if (out / "reference.json").is_file():
            assert verify.verify_folder(out).findings == []
        else:
            assert checkpoint.quantization is None


def remove_all(out: Path) -> None:
    """The export, and what an interrupted one goes on from."""
    for path in out.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """Kill a forked process at each operation."""
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    verify._served = lambda *_: iter(())  # slow, and it writes nothing
    verify.reference_windows = gguf_certificate.reference_windows = lambda *_: WINDOWS
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
    kind, every = sys.argv[1], int(sys.argv[4])
    model, out = Path(sys.argv[2]), Path(sys.argv[3])
    out.parent.mkdir()
    EXPORTS[kind](model, out)  # what is slow the first time is not slow in every child
    killed = 0
    for turn in range(1, 10_000, every):
        remove_all(out)
        child = os.fork()
        if child == 0:
            failpoints.arm(f"durable.op=kill@{turn}")
            EXPORTS[kind](model, out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
        check_left(out)
    assert os.waitstatus_to_exitcode(status) == 0
    assert killed > 20 // every, killed
    assert out.exists()
    check_left(out)
    sweep_stale(out.parent, out.name)
    left = {path.name for path in out.parent.iterdir()} - {out.name}
    assert left <= {f"{out.name}.certificate.json", f"{out.name}.reference.logits"}, left
    print(f"killed {killed} times")


if __name__ == "__main__":
    main()
