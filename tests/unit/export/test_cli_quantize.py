"""`llmserve quantize` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from support.models import TEXT, make_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("run") / "model")
    (folder / "evaluation.txt").write_text(TEXT * 9, encoding="utf-8")
    (folder / "calibration.txt").write_text(TEXT[::-1] * 2, encoding="utf-8")
    return folder


def test_folder_beside_the_model_is_the_default(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(model), "--scheme", "int8", "--overwrite"]) == 0
    out = model.parent / "model-int8"
    assert Checkpoint.open(out).quantization is not None
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert printed.rstrip().endswith(f"int8 model: {out}")


@pytest.mark.parametrize(
    ("options", "group_sizes"),
    [
        (["--scheme", "int4"], {32: None, 48: 24}),
        (["--scheme", "int4", "--group-size", "16"], {32: 16, 48: 16}),
        (["--scheme", "int4", "--group-size", "row"], {32: None, 48: None}),
        (["--scheme", "int8", "--group-size", "8"], {32: 8, 48: 8}),
    ],
)
def test_group_size_is_as_asked(
    model: Path, tmp_path: Path, options: list[str], group_sizes: dict[int, int | None]
) -> None:
    out = tmp_path / "small"
    assert main(["quantize", str(model), "--no-measure", "--out", str(out), *options]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    found = {layer["shape"][1]: layer["group_size"] for layer in report["layers"]}
    assert found == group_sizes


def test_layers_are_listed_on_demand(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(model), "--scheme", "int8", "--no-measure", "--layers"]
    assert main([*command, "--out", str(tmp_path / "small")]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--scheme", "int8", "--no-measure", "--text", "x.txt"], 2, "leave out --no-measure"),
        (["--scheme", "nf4", "--no-measure", "--group-size", "8"], 2, "choice of int8 and int4"),
        (["--scheme", "int8", "--text", "absent.txt"], 1, "absent.txt: cannot be read"),
        ([], 2, "give --scheme (int8, w8a8, int4"),
        (["--scheme", "int8", "--max-kl", "0.1"], 2, "leave out --scheme"),
        (["--scheme", "int4", "--layer", "x"], 2, "an exception is NAME=FORM"),
        (["--scheme", "int4", "--layer", "x=int4"], 2, "no layer is called 'x'"),
        (["--scheme", "int4", "--layer", "up_proj=int5"], 2, "form 'int5' is unknown"),
        (["--scheme", "nf4", "--method", "gptq"], 2, "has no choice of method"),
        (["--scheme", "int4", "--method", "gptq", "--calibration", "no.txt"], 1, "no.txt: cannot"),
        (["--max-size", "10kB"], 1, "no mixture of forms keeps the bounds; the nearest misses"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert main(["quantize", str(model), "--out", str(tmp_path / "small"), *options]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("options", [
        ["--group-size", "0"], ["--max-tokens", "x"], ["--max-size", "4 bananas"],
        ["--max-perplexity-increase", "1"], ["--max-kl", "-1"], ["--scheme", "int5"],
    ],
)  # fmt: skip
def test_malformed_options_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), *options])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_exceptions_are_for_the_layers_they_name(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    command = ["quantize", str(model), "--scheme", "int4", "--group-size", "16", "--no-measure"]
    exceptions = ["--layer", "down_proj=int8:row", "--layer", "layers.0.self_attn=float"]
    assert main([*command, "--asymmetric", *exceptions, "--out", str(out)]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    found = {layer["name"]: (layer["form"], layer["group_size"]) for layer in report["layers"]}
    assert found["model.layers.1.mlp.down_proj"] == ("int8", None)
    assert found["model.layers.1.mlp.up_proj"] == ("int4", 16)
    assert set(report["left_as_they_are"]) == {
        f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"
    }
    written = Checkpoint.open(out).quantization
    assert written is not None
    assert written.scheme == "int4+int8"


def test_contract_writes_the_best_that_fits(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, size = tmp_path / "small", 53_000
    assert main(["quantize", str(model), "--max-size", "53kB", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "* " in printed
    assert "95 %" in printed
    checkpoint = Checkpoint.open(out)
    assert checkpoint.stored_bytes() <= size
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["bytes_after"] == checkpoint.stored_bytes()
    assert {layer["method"] for layer in report["layers"]} <= {"gptq", "mse"}
