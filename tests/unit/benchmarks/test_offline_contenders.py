"""Who takes part: options, names of the model's forms, and what is said when one is missing."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from llmserve.benchmarks.cli_bench import add_arguments
from llmserve.benchmarks.offline_contenders import OfflineOptions, contenders, offline_options
from llmserve.errors import ConfigError


def parse(*arguments: str) -> OfflineOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return offline_options(parser.parse_args(["offline", *arguments]))


def make_forms(folder: Path) -> Path:
    """Empty files under every name that is looked for."""
    for ending in ("", "-int4", "-int8", "-q4_0.gguf", "-q8_0.gguf", "-bf16.gguf"):
        (folder / f"M{ending}").touch()
    for engine in ("openvino", "onnxruntime-genai"):
        for scheme in ("int4", "int8"):
            (folder / f"M-{engine}-{scheme}").touch()
            (folder / f"M-onnx-{scheme}").touch()
    return folder / "M"


def test_every_named_peer_has_a_row_for_each_scheme_it_takes(tmp_path: Path) -> None:
    model = str(make_forms(tmp_path))
    peers = ["--llama-cpp", "bin", "--transformers", "python", "--openvino", "python"]
    peers += ["--onnxruntime-genai", "python"]
    schemes = [scheme for scheme, _ in contenders(parse(model, "--schemes", "int8,bf16", *peers))]
    ours, theirs = schemes[:2], schemes[2:]
    assert ours == ["int8", "bf16"]
    assert theirs == ["int8", "int8", "int8", "bf16", "bf16"]  # the last is transformers
    assert [scheme for scheme, _ in contenders(parse(model))] == ["int4", "int8"]


def test_graph_is_run_by_our_runner_and_by_onnxruntime_genai_alone(tmp_path: Path) -> None:
    model = str(make_forms(tmp_path))
    peers = ["--llama-cpp", "bin", "--openvino", "python", "--onnxruntime-genai", "python"]
    options = parse(model, "--schemes", "onnx-int8,onnx-int4", *peers)
    assert [scheme for scheme, _ in contenders(options)] == ["onnx-int8", "onnx-int4"] * 2


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("M-int4", "llmserve quantize .*/M --scheme int4 --no-measure"),
        ("M-q8_0.gguf", "llmserve export gguf .*/M --type q8_0"),
        ("M-openvino-int4", "benchmarks/peer_openvino.py"),
        ("M-onnxruntime-genai-int8", "benchmarks/peer_onnxruntime.py"),
        ("M-onnx-int8", "llmserve export onnx .*/M --scheme int8 --out .*/M-onnx-int8"),
    ],
)
def test_missing_form_is_named_with_how_to_make_it(
    missing: str, command: str, tmp_path: Path
) -> None:
    model = make_forms(tmp_path)
    (tmp_path / missing).unlink()
    options = OfflineOptions(
        model=model,
        llama_cpp=Path("bin"),
        openvino=Path("python"),
        onnxruntime_genai=Path("python"),
        schemes=("int4", "int8", "onnx-int8"),
    )
    with pytest.raises(ConfigError, match=f"{missing} is missing; make it with .*{command}"):
        list(contenders(options))


def test_options_of_the_command_line() -> None:
    options = parse("M", "--sequences", "32,1,1", "--schemes", "int8", "--runner", "torch")
    assert options.sequences == (1, 32)
    assert options.schemes == ("int8",)
    assert options.runner == "torch"
    assert options.llama_cpp is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sequences 1,x", "whole numbers"),
        ("--sequences 0", "at least 1"),
        ("--repeats 0", "at least 1"),
        ("--threads 0", "--threads must be at least 1"),
        ("--schemes int4,nf4", "takes some of int4, int8, bf16"),
        ("--seed -1", "the seed 0"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("M", *arguments.split())
