"""The command line's surface: what help costs, what errors look like, and the page about it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmserve.cli import VERBS, main

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmserve", *arguments], capture_output=True, text=True, check=False
    )


def test_help_names_every_verb() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert all(f"  {verb} " in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    arguments = [*verb.split(), "--help"] if verb else ["--help"]
    code = (
        "import sys\n"
        "from llmserve.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'onnx', 'tokenizers', 'aiohttp', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage: llmserve" in result.stdout


def test_unknown_verb_is_refused_with_the_list() -> None:
    result = run("servve")
    assert result.returncode == 2
    assert "invalid choice: 'servve'" in result.stderr
    assert "Traceback" not in result.stderr


def test_error_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", str(tmp_path / "no-such-model"), "Hello"])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("llmserve: error: ")
    assert "no-such-model" in captured.err


def test_setting_that_cannot_be_used_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model"]) == 2
    assert "no prompt was given" in capsys.readouterr().err


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    module = generator()
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run `make docs`"
    assert module.PEERS_PAGE.read_text(encoding="utf-8") == module.render_peers(), "run `make docs`"
    quality = module.QUALITY_PAGE.read_text(encoding="utf-8")
    assert quality == module.render_quality(), "run `make docs`"


@pytest.mark.parametrize(
    ("page", "sections", "word"),
    [("README", ["demo", "peers"], "bits per byte"), ("PLANNING_PAGE", ["plan"], "Closed loops")],
)
def test_figures_of_a_page_are_those_of_the_results(
    page: str, sections: list[str], word: str
) -> None:
    module = generator()
    text = getattr(module, page).read_text(encoding="utf-8")
    assert text == module.render_sections(text), "run `make docs`"
    assert [name for _, name, _ in module.SECTION.findall(text)] == sections
    edited = text.replace(word, "something else", 1)
    assert edited != text
    assert module.render_sections(edited) == text
