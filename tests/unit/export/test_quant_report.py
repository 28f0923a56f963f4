"""The report of a quantization, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.export.measure import Comparison
from llmserve.export.quant_report import QuantizationReport, make_report
from llmserve.export.quant_table import format_report
from llmserve.export.quantize import Scheme, quantize_model
from support.variants import GPT2, LLAMA, MIXTRAL, QWEN2, QWEN3_MOE, random_tensors

FOUND = Comparison(
    num_tokens=1234,
    loss_before=1.0,
    loss_after=1.5,
    mean_kl=0.25,
    top1_agreement=0.875,
    max_logit_error=2.0,
)


def report_of(
    path: Path,
    config: ModelConfig = LLAMA,
    *,
    scheme: Scheme = "int4",
    group_size: int | None = 8,
    comparison: Comparison | None = FOUND,
) -> QuantizationReport:
    save_model(path / "model", config, random_tensors(config))
    source = Checkpoint.open(path / "model")
    model = quantize_model(source, scheme, group_size)
    return make_report(source, model, comparison=comparison, text_sha256=None)


def test_bits_per_weight_count_everything_that_is_stored(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    layer = next(layer for layer in report.layers if layer.name.endswith("0.mlp.up_proj"))
    assert layer.shape == (40, 24)
    integers, scales, shape = 40 * 24 * 4, 40 * 3 * 32, 2 * 64
    assert layer.bits_per_weight == pytest.approx((integers + scales + shape) / (40 * 24))
    weights = [layer.shape[0] * layer.shape[1] for layer in report.layers]
    bits = [layer.bits_per_weight for layer in report.layers]
    assert report.bits_per_weight == pytest.approx(np.average(bits, weights=weights))


def test_errors_are_those_of_the_layer(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    source = Checkpoint.open(tmp_path / "model")
    model = quantize_model(source, "int4", 8)
    for layer in report.layers:
        weight = source.float32(f"{layer.name}.weight")
        error = model.layers[layer.name].dequantize() - weight
        assert layer.max_error == pytest.approx(np.abs(error).max())
        assert layer.relative_error == pytest.approx(
            np.linalg.norm(error) / np.linalg.norm(weight), rel=1e-5
        )


def test_json_holds_every_figure(tmp_path: Path) -> None:
    values = json.loads(json.dumps(report_of(tmp_path).as_json(), allow_nan=False))
    assert values["comparison"]["perplexity_after"] == pytest.approx(np.exp(1.5))
    assert values["comparison"]["mean_kl"] == 0.25
    assert values["bits_per_weight"] > 4
    assert "<= |scale| / 2" in values["error_bound"]
    assert len(values["layers"]) == 14
    assert values["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"


def test_table_shows_the_figures(tmp_path: Path) -> None:
    lines = {
        line[:24].strip(): line[24:].split()
        for line in format_report(report_of(tmp_path)).splitlines()
    }
    assert lines["perplexity"] == ["2.7183", "4.4817"]
    assert lines["KL divergence, nats"] == ["0.250000"]
    assert lines["same likeliest token"] == ["87.50%"]
    assert lines["largest logit error"] == ["2.0000"]
    assert lines["tokens measured"] == ["1234"]


def test_table_of_layers_has_a_line_for_each(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert "model.layers.1.mlp.down_proj" not in format_report(report)
    table = format_report(report, layers=True)
    assert table.count("_proj ") == 14
    line = next(line for line in table.splitlines() if "1.mlp.down_proj" in line)
    assert line.split()[1:4] == ["24x40", "int4", "8"]


def test_table_says_when_nothing_was_measured(tmp_path: Path) -> None:
    table = format_report(report_of(tmp_path, comparison=None))
    assert "quality: not measured" in table
    assert "perplexity" not in table


@pytest.mark.parametrize(
    ("config", "scheme", "group_size", "note"),
    [
        (LLAMA, "int4", 8, "group size 8: vLLM's"),
        (LLAMA, "int4", None, None),
        (LLAMA, "int8", None, "only together with int8 activations"),
        (GPT2, "int4", None, "llmserve alone opens"),
        (MIXTRAL, "int4", None, "llmserve alone opens"),
        (QWEN2, "int4", None, None),
        (QWEN3_MOE, "int4", None, "experts"),
    ],
)
def test_notes_say_who_may_refuse_it(
    tmp_path: Path, config: ModelConfig, scheme: Scheme, group_size: int | None, note: str | None
) -> None:
    notes = report_of(tmp_path, config, scheme=scheme, group_size=group_size).notes
    assert len(notes) == (note is not None)
    if note is not None:
        assert note in notes[0]
