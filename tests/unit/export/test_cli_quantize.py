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
    (folder / "evaluation.txt").write_text(TEXT, encoding="utf-8")
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


@pytest.mark.parametrize("options", [["--group-size", "0"], ["--max-tokens", "x"], []])
def test_malformed_options_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    scheme = ["--scheme", "int8"] if options else []
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), *scheme, *options])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err
