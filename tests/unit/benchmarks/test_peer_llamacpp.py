"""llama.cpp's programs as they are called and read; scripts stand in for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmserve.benchmarks.peer_llamacpp import LlamaCpp, tensor_types
from llmserve.errors import ConfigError, EngineError
from llmserve.export.gguf import export_gguf
from support.gguf_reader import read_gguf
from support.models import make_model_folder

BENCH = """
import sys
if "--version" in sys.argv:
    print("version: 1.2 (build 3)", file=sys.stderr)
else:
    assert sys.argv[sys.argv.index("-n") + 1] == "0"
    print('[{"n_prompt": %s, "avg_ts": 750.5}]' % sys.argv[sys.argv.index("-p") + 1])
"""
BATCHED = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(__file__ + ".json", "w") as file:
    json.dump(options, file)
print("a line of its log")
print(json.dumps({"pl": int(options["-npl"]), "speed_tg": 10.0 * int(options["-npl"])}))
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("run") / "model")
    return export_gguf(folder, kind="q4_0").path


def programs(folder: Path, batched: str = BATCHED) -> Path:
    for name, source in (("llama-bench", BENCH), ("llama-batched-bench", batched)):
        (folder / name).write_text(f"#!{sys.executable}\n{source}")
        (folder / name).chmod(0o755)
    return folder


def test_types_are_those_of_the_file(gguf: Path) -> None:
    assert tensor_types(gguf) == read_gguf(gguf).types


def test_description_names_scheme_head_cache_and_version(gguf: Path, tmp_path: Path) -> None:
    engine = LlamaCpp(programs(tmp_path), gguf, 2)
    assert engine.description == {
        "engine": "llama.cpp",
        "weights": "q4_0, q8_0 head",
        "cache": "f16",
        "versions": {"llama.cpp": "1.2 (build 3)"},
    }


def test_rates_come_from_the_programs_at_the_lengths_asked(gguf: Path, tmp_path: Path) -> None:
    engine = LlamaCpp(programs(tmp_path), gguf, 2)
    assert engine.prefill([5] * 40) == 750.5
    assert engine.decode([[1] * 12] * 3, 8) == 30.0
    options = json.loads((tmp_path / "llama-batched-bench.json").read_text())
    assert {name: options[name] for name in ("-npp", "-ntg", "-npl", "-c", "-t", "-m")} == {
        "-npp": "12",
        "-ntg": "8",
        "-npl": "3",
        "-c": "60",
        "-t": "2",
        "-m": str(gguf),
    }


def test_program_that_fails_is_an_error_with_its_last_line(gguf: Path, tmp_path: Path) -> None:
    failing = "import sys\nprint('first', file=sys.stderr)\nsys.exit('no memory')"
    engine = LlamaCpp(programs(tmp_path, failing), gguf, 2)
    with pytest.raises(EngineError, match="llama-batched-bench ended with code 1: no memory"):
        engine.decode([[1]], 1)


def test_program_without_a_row_is_an_error(gguf: Path, tmp_path: Path) -> None:
    engine = LlamaCpp(programs(tmp_path, "print('nothing')"), gguf, 2)
    with pytest.raises(EngineError, match="printed 0 rows"):
        engine.decode([[1]], 1)


def test_missing_program_or_file_is_named(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no llama-bench"):
        LlamaCpp(tmp_path, gguf, 2)
    with pytest.raises(ConfigError, match="cannot be read"):
        tensor_types(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"GGML" + bytes(40), b"GGUF\x03\0\0\0" + b"\xff" * 16, b"GG"])
def test_file_of_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ConfigError, match="no GGUF file"):
        tensor_types(tmp_path / "file")
