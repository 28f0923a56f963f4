"""What `llmserve bench serve` saves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from support.bench_serve import Captured, bench, last_json
from support.scripted_server import ScriptedServer

pytestmark = pytest.mark.http


def test_result_is_saved_with_details(tmp_path: Path, capsys: Captured) -> None:
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "4", "--max-concurrency", "2", "--save-result", "--save-detailed"),
            *("--result-dir", str(tmp_path / "results"), "--result-filename", "r.json"),
            *("--html", str(tmp_path / "pages" / "r.html")),
        )
    assert code == 0
    page = (tmp_path / "pages" / "r.html").read_text(encoding="utf-8")
    assert "Load test of scripted" in page
    assert page.count("<svg") == 6
    saved = json.loads((tmp_path / "results" / "r.json").read_text(encoding="utf-8"))
    printed = last_json(capsys)
    assert saved["input_lens"] == [6] * 4
    assert saved["output_lens"] == [4] * 4
    assert saved["generated_texts"] == ["t0 t1 t2 t3 "] * 4
    assert [len(gaps) for gaps in saved["itls"]] == [3] * 4
    assert "input_lens" not in printed
    assert printed.items() <= saved.items()


def test_result_that_cannot_be_saved_is_an_error_after_the_figures(
    tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("")
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "2", "--save-result", "--result-dir", str(tmp_path / "file")),
        )
    captured = capsys.readouterr()
    assert code == 1
    assert json.loads(captured.out.splitlines()[-1])["completed"] == 2
    assert "cannot save the result" in captured.err


def test_full_disk_loses_no_figure_and_no_other_file(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(data)

    monkeypatch.setattr("llmserve.benchmarks.load_report.write_bytes", write)
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "2", "--html", str(tmp_path / "r.html")),
            *("--markdown", str(tmp_path / "r.md")),
        )
    assert code == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["completed"] == 2
    assert "r.html: [Errno 28] No space left on device" in captured.err
    assert (tmp_path / "r.md").exists()
