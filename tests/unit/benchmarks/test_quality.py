"""What forms cost: the reference costs nothing, coarser ones more, and int8 activations little."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.benchmarks.quality import QualityOptions, bench_quality, measure_quality
from llmserve.benchmarks.quality_page import quality_markdown
from llmserve.errors import ConfigError
from llmserve.native.kernels import available_paths
from support.models import make_model_folder
from support.quantized_folders import write_quantized

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> QualityOptions:
    root = tmp_path_factory.mktemp("quality")
    model = make_model_folder(root / "model")
    write_quantized(model, root / "int8", "int8")
    write_quantized(model, root / "int4", "int4", 8)
    (root / "text").write_text("the cat sat on the mat and ran away again " * 20, encoding="utf-8")
    return QualityOptions(
        model=model,
        forms=(root / "int8", root / "int4"),
        text=root / "text",
        window=16,
        max_tokens=64,
        repeats=0,
    )


def test_costs_grow_with_coarseness(options: QualityOptions) -> None:
    reference, int8, int8_executed, int4, int4_executed = measure_quality(options)
    assert reference.kl == 0.0
    assert len(reference.losses) == 4
    assert 0 < int8.kl < int4.kl
    assert int8.kl < int8_executed.kl
    assert int4.kl == pytest.approx(int4_executed.kl, rel=0.5)


def test_table_and_document_agree(
    options: QualityOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_quality(options) == 0
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    forms = document["forms"]
    assert [row["form"] for row in forms][:2] == ["model", "int8, float32 activations"]
    assert [row["is_served"] for row in forms] == [True, False, True, False, True]
    assert "\n".join(table) + "\n" == quality_markdown(document) + "\n"
    assert {row["bytes"] for row in forms[1:3]} == {
        (options.forms[0] / "model.safetensors").stat().st_size
    }


def test_a_quantized_reference_is_refused(options: QualityOptions) -> None:
    wrong = QualityOptions(model=options.forms[0], forms=options.forms, text=options.text)
    with pytest.raises(ConfigError, match="is quantized"):
        measure_quality(wrong)


def test_a_text_under_one_window_is_refused(options: QualityOptions, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a", encoding="utf-8")
    short = QualityOptions(model=options.model, forms=options.forms, text=tmp_path / "short")
    with pytest.raises(ConfigError, match="less than one window"):
        measure_quality(short)


def test_document_table_and_plot_are_kept(options: QualityOptions, tmp_path: Path) -> None:
    assert bench_quality(replace(options, forms=options.forms[:1], out=tmp_path / "out")) == 0
    kept = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert kept.keys() == {"quality-model.json", "quality-model.md", "quality-model.svg"}
    document = json.loads(kept["quality-model.json"])
    assert kept["quality-model.md"] == quality_markdown(document, "quality-model.svg")
    assert kept["quality-model.svg"].count("not timed</text>") == 2
