"""Contracts on a small model: what is written keeps the bounds, and nothing smaller found does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.durable import write_manifest
from llmserve.errors import ConfigError, ExportError
from llmserve.export.evaluation_text import EvaluationText
from llmserve.export.measure import text_windows
from llmserve.export.quant_options import Contract, QuantizationOptions
from llmserve.export.quant_store import BlockStore
from llmserve.export.quantize import QuantizedModel, quantize_layers
from llmserve.export.quantize_folder import quantize_folder
from llmserve.export.search_contract import search_contract
from llmserve.export.search_layers import measure_units
from llmserve.quant.layout import encode_layer
from llmserve.text.tokenizer import Tokenizer
from support.models import TEXT, make_model_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_model_folder(tmp_path_factory.mktemp("models") / "model"))


def text(source: Checkpoint, content: str) -> EvaluationText:
    ids = Tokenizer.load(source.path).encode(content, add_special_tokens=False)
    windows = text_windows(ids, length=64, bos_token_id=None)
    return EvaluationText(windows=windows, sha256="")


def search(source: Checkpoint, contract: Contract) -> tuple[QuantizedModel, list[str]]:
    lines: list[str] = []
    model = search_contract(
        source, QuantizationOptions(contract=contract), text(source, TEXT[::-1] * 2),
        text(source, TEXT * 6), lambda *_: None, lines.append,
    )  # fmt: skip
    return model, lines


def points(lines: list[str]) -> list[tuple[str, int, float]]:
    """Mark, bytes, and upper end of the KL's interval of each line."""
    pattern = re.compile(r"(.) +([\d,]+) bytes +KL ([\d.]+) ± ([\d.]+)")
    found = [match.groups() for line in lines if (match := pattern.match(line))]
    return [
        (mark, int(size.replace(",", "")), float(kl) + float(off)) for mark, size, kl, off in found
    ]


def test_smallest_point_that_keeps_a_bound_is_taken(source: Checkpoint) -> None:
    _, lines = search(source, Contract(max_kl=0.02))
    found = points(lines)
    (chosen,) = (one for one in found if one[0] == "*")
    assert chosen[2] <= 0.02
    assert all(mark == "-" and upper > 0.02 for mark, size, upper in found if size < chosen[1])


def test_both_bounds_hold(source: Checkpoint) -> None:
    _, lines = search(source, Contract(max_kl=0.1, max_bytes=60_000))
    (chosen,) = (one for one in points(lines) if one[0] == "*")
    assert chosen[1] <= 60_000
    assert chosen[2] <= 0.1


def test_bounds_that_cannot_be_kept_name_the_nearest(source: Checkpoint) -> None:
    with pytest.raises(ExportError, match=r"misses one by a factor of [\d.]+: [\d,]+ bytes"):
        search(source, Contract(max_kl=1e-4, max_bytes=50_000))


def test_interval_needs_two_windows(source: Checkpoint) -> None:
    options = QuantizationOptions(contract=Contract(max_kl=1.0))
    short = text(source, "Once upon a time")
    with pytest.raises(ConfigError, match="an interval needs two"):
        search_contract(source, options, short, short, lambda *_: None, lambda _: None)


def test_sizes_are_those_on_disk_and_floats_cost_nothing(source: Checkpoint) -> None:
    windows = text(source, TEXT[::-1] * 2).windows
    units = measure_units(source, windows, has_zeros=True, on_progress=lambda *_: None)
    assert len(units) == 4 * source.config.num_layers
    for unit in units:
        for form, option in zip(unit.forms, unit.options, strict=True):
            layers = quantize_layers(source, form, "rtn").layers
            stored = [
                array.nbytes for n, q in layers.items() for array in encode_layer(n, q).values()
            ]
            floats = [source.stored(f"{n}.weight").nbytes for n in form if n not in layers]
            assert option.num_bytes == sum(stored) + sum(floats)
            assert (option.cost == 0.0) is (not layers)


def bounded(**bounds: Any) -> QuantizationOptions:
    return QuantizationOptions(contract=Contract(**bounds), max_tokens=400)


def folder_with_texts(folder: Path) -> Path:
    make_model_folder(folder)
    (folder / "evaluation.txt").write_text(TEXT * 4)
    (folder / "calibration.txt").write_text(TEXT[::-1] * 2)
    write_manifest(folder)
    return folder


KILLED = """
import os, pathlib, sys
from llmserve import failpoints
from unit.export.test_search_contract import bounded
from llmserve.export.quantize_folder import quantize_folder
model, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
failpoints.arm("durable.op=kill@75")
quantize_folder(model, out, bounded(max_kl=0.02))
"""


@pytest.mark.timeout(180)  # two searches and half of one
def test_killed_search_goes_on_where_it_was_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = folder_with_texts(tmp_path / "model"), tmp_path / "small"
    paths = os.pathsep.join(sys.path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(model), str(out)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not out.exists()
    kept = {path.stem for path in (tmp_path / ".small.partial").glob("*.json")} - {"plan"}
    assert {name.partition("-")[0] for name in kept} == {"unit", "point"}, "killed too early"
    written: list[str] = []
    write = BlockStore.write_figures

    def count(store: BlockStore, name: str, figures: Any) -> None:
        written.append(name)
        write(store, name, figures)

    monkeypatch.setattr(BlockStore, "write_figures", count)
    quantize_folder(model, out, bounded(max_kl=0.02))
    assert written, "nothing was left to be done"
    assert not kept & set(written), "measured twice"
    assert not (tmp_path / ".small.partial").exists()
    quantize_folder(model, tmp_path / "whole", bounded(max_kl=0.02))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name


def test_other_bounds_after_a_miss_measure_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder_with_texts(tmp_path / "model")
    with pytest.raises(ExportError, match="misses one by a factor"):
        quantize_folder(model, tmp_path / "small", bounded(max_kl=1e-9, max_bytes=60_000))
    monkeypatch.setattr("llmserve.export.search_contract.measure_model", None)
    monkeypatch.setattr("llmserve.export.search_layers._Meter", None)
    quantize_folder(model, tmp_path / "small", bounded(max_kl=1.0, max_bytes=60_000))
    assert Checkpoint.open(tmp_path / "small").quantization is not None
