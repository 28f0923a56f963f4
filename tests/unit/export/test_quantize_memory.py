"""Quantizing needs about one layer above the model's memory, measuring and verifying included."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.checkpoint import save_model
from llmserve.text.tokenizer import Tokenizer
from support.models import TEXT
from support.variants import LLAMA, random_tensors

_CHILD = """
import pathlib, sys, threading, torch
from llmserve.export.quant_options import QuantizationOptions
from llmserve.export.quantize_folder import quantize_folder

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(l.split()[1]) << 10 for l in status.splitlines() if l.startswith("RssAnon"))

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

def quantize(model):
    options = QuantizationOptions(scheme="int8", max_tokens=128)
    quantize_folder(folder / model, folder / f"{model}-small", options)

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
quantize("tiny")  # what is imported and kept for good
begin = peak = anonymous()
done = threading.Event()
threading.Thread(target=watch, daemon=True).start()
quantize("model")
done.set()
print(peak - begin)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_near_one_layer_above_the_models(tmp_path: Path) -> None:
    pytest.importorskip("llmserve.native._kernels", reason="the kernels are not built here")
    files = Tokenizer.train("char", [TEXT], vocab_size=300).files()
    files["evaluation.txt"] = TEXT.encode()
    tiny = dataclasses.replace(LLAMA, vocab_size=300)
    config = dataclasses.replace(tiny, hidden_size=256, intermediate_size=2048, num_layers=12)
    save_model(tmp_path / "tiny", tiny, random_tensors(tiny, scale=0.03), extra_files=files)
    tensors = random_tensors(config, scale=0.03)
    save_model(tmp_path / "model", config, tensors, extra_files=files)
    layer = sum(array.nbytes for name, array in tensors.items() if ".layers.0." in name)
    total = sum(array.nbytes for array in tensors.values())
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: freed is given back
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < total + layer, "the weights are in memory more than once"
