"""The quantized folder: what it holds, and that it appears whole or not at all (R17)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint
from llmserve.durable import verify_manifest
from llmserve.errors import CheckpointError, ConfigError
from llmserve.export.quant_options import QuantizationOptions
from llmserve.export.quantize_folder import quantize_folder
from llmserve.failpoints import FailpointError
from llmserve.lineage import extended_lineage, history_files
from support.file_operations import EVERY
from support.models import TEXT, make_model_folder


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an evaluation text."""
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "model")
    (folder / "evaluation.txt").write_text(TEXT * 3, encoding="utf-8")
    (folder / "calibration.txt").write_text(TEXT[::-1] * 2, encoding="utf-8")
    (folder / "training_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return folder


INT4 = QuantizationOptions(scheme="int4", group_size=16)
GPTQ = QuantizationOptions(scheme="int4", group_size=16, method="gptq", measure=False)
PLAIN = QuantizationOptions(scheme="int8", measure=False)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_folder_holds_model_tokenizer_report_lineage_and_manifest(
    original: Path, tmp_path: Path
) -> None:
    report = quantize_folder(original, tmp_path / "small", INT4)
    files = content(tmp_path / "small")
    assert set(files) == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "quantization_report.json"),
        *("lineage.json", "training_log.jsonl", "manifest.json"),
        *("reference.json", "reference.logits", "certificate.json"),
    }
    assert files["tokenizer.json"] == (original / "tokenizer.json").read_bytes()
    assert json.loads(files["quantization_report.json"]) == json.loads(json.dumps(report.as_json()))
    verify_manifest(tmp_path / "small")
    written = Checkpoint.open(tmp_path / "small")
    assert report.bytes_after == written.stored_bytes()
    lineage = json.loads(files["lineage.json"])["quantization"]
    assert lineage["source"] == Checkpoint.open(original).fingerprint
    assert (lineage["scheme"], lineage["group_size"]) == ("int4", 16)


def test_everything_is_measured_by_default(original: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    report = quantize_folder(
        original,
        tmp_path / "small",
        QuantizationOptions(scheme="int8"),
        on_progress=lambda *stage: stages.append(stage),
    )
    assert report.comparison is not None
    assert report.comparison.num_tokens > 50
    assert 0 < report.comparison.mean_kl < 0.1
    assert report.text_sha256 is not None
    for name in ("quantizing", "measuring"):
        done = [(done, total) for stage, done, total in stages if stage == name]
        assert done[-1][0] == done[-1][1] > 0


@pytest.mark.parametrize(
    "options",
    [INT4, GPTQ, QuantizationOptions(scheme="w8a8", method="smoothquant", has_int8_cache=True)],
    ids=lambda options: options.method,
)
def test_quantizing_twice_gives_the_same_folder(
    original: Path, tmp_path: Path, options: QuantizationOptions
) -> None:
    for name in ("once", "twice"):
        quantize_folder(original, tmp_path / name, options)
    assert content(tmp_path / "once") == content(tmp_path / "twice")


def test_lineage_keeps_the_stages_before(tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text('{"run": {"steps": 3}}')
    lineage = json.loads(extended_lineage(tmp_path, "quantization", {"scheme": "int8"}))
    assert lineage == {"run": {"steps": 3}, "quantization": {"scheme": "int8"}}


def test_the_log_of_the_training_goes_with_the_weights(tmp_path: Path) -> None:
    assert set(history_files(tmp_path, "merge", {})) == {"lineage.json"}
    (tmp_path / "training_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    files = history_files(tmp_path, "merge", {})
    assert files["training_log.jsonl"] == (tmp_path / "training_log.jsonl").read_bytes()
    assert "merge" in json.loads(files["lineage.json"])


def test_lineage_that_is_malformed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"lineage\.json"):
        extended_lineage(tmp_path, "quantization", {})


def quantize(original: Path, out: Path, *, overwrite: bool) -> None:
    quantize_folder(original, out, PLAIN, overwrite=overwrite)


def failing_operations(original: Path, out: Path, every: int, *, overwrite: bool) -> Iterator[int]:
    """Fail one durable operation after another, until a run has no more of them."""
    for turn in range(1, 500, every):
        failpoints.arm(f"durable.op=raise@{turn}")
        try:
            quantize(original, out, overwrite=overwrite)
        except FailpointError:
            yield turn
        else:
            return
        finally:
            failpoints.disarm_all()


@EVERY
@pytest.mark.usefixtures("quick_certificate")
def test_no_failed_operation_spoils_the_folder_that_is_replaced(
    original: Path, tmp_path: Path, every: int
) -> None:
    out = tmp_path / "small"
    quantize_folder(original, out, dataclasses.replace(INT4, measure=False))
    old = content(out)
    turns = 0
    for turn in failing_operations(original, out, every, overwrite=True):
        turns = turn
        Checkpoint.open(out)
        if content(out) != old:  # the new one was complete before the failure
            quantize_folder(original, out, dataclasses.replace(INT4, measure=False), overwrite=True)
    assert turns > 20
    assert Checkpoint.open(out).quantization is not None
    assert content(out) != old
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_interrupt_while_writing_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmserve.model_folder.write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(original, tmp_path / "small", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_failpoint_before_writing(original: Path, tmp_path: Path) -> None:
    failpoints.arm("quant.write=raise")
    with pytest.raises(FailpointError):
        quantize(original, tmp_path / "small", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_folder_that_exists_is_refused_before_any_work(original: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty; give another --out, or --overwrite"):
        quantize(original, tmp_path, overwrite=False)


def test_folder_of_others_is_not_overwritten(original: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by llmserve"):
        quantize(original, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["model", "."])
def test_folder_that_holds_the_original_is_not_overwritten(tmp_path: Path, target: str) -> None:
    folder = make_model_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds the model that is read"):
        quantize(folder, tmp_path / target, overwrite=True)
    Checkpoint.open(folder)


def test_int8_cache_is_recorded_and_measured(original: Path, tmp_path: Path) -> None:
    options = QuantizationOptions(scheme="int8", has_int8_cache=True)
    report = quantize_folder(original, tmp_path / "small", options)
    written = Checkpoint.open(tmp_path / "small").quantization
    assert written is not None
    assert written.has_int8_cache
    assert report.comparison is not None
    assert report.cache_comparison is not None
    assert report.cache_comparison.mean_kl > report.comparison.mean_kl


def test_interrupted_quantization_goes_on_with_the_block_where_it_was(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_folder(original, tmp_path / "whole", GPTQ)
    module = sys.modules["llmserve.export.quantize"]
    quantize_block = module.quantize_block
    done: list[int] = []

    def once(index: int, *args: object, **kwargs: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(index)
        return quantize_block(index, *args, **kwargs)

    monkeypatch.setattr(module, "quantize_block", once)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(original, tmp_path / "small", GPTQ)
    assert (tmp_path / ".small.partial/block-00000.safetensors").is_file()
    assert not (tmp_path / "small").exists()
    done.clear()
    quantize_folder(original, tmp_path / "small", GPTQ)
    assert done == [1], "block 0 was made again"
    assert content(tmp_path / "small") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]


def test_blocks_of_another_plan_are_not_used(original: Path, tmp_path: Path) -> None:
    failpoints.arm("quant.write=raise")
    with pytest.raises(FailpointError):
        quantize_folder(original, tmp_path / "small", GPTQ)
    failpoints.disarm_all()
    other = dataclasses.replace(GPTQ, group_size=8)
    quantize_folder(original, tmp_path / "small", other)
    quantize_folder(original, tmp_path / "whole", other)
    assert content(tmp_path / "small") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8", "double_quant": True}, "--double-quant is a choice of nf4 and fp4"),
        ({"scheme": "nf4", "has_int8_cache": True}, "--kv-cache int8 is recorded in int8"),
        ({"scheme": "int4", "method": "smoothquant"}, "use --scheme w8a8"),
        ({"scheme": "int4", "calibration": Path("x")}, "--method rtn reads no calibration text"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationOptions(**options)
