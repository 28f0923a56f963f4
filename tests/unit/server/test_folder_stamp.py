from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmserve.server.engine_settings import EngineSettings
from llmserve.server.folder_stamp import stamp_of


def test_files_that_were_replaced_or_changed_are_told(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings = EngineSettings(model=str(folder), runner="fake", draft_model=str(model_folder))
    before = stamp_of(settings)
    assert str(folder / "model.safetensors") in before
    assert str(model_folder / "config.json") in before
    (folder / "notes.txt").write_text("nobody loads this")
    assert stamp_of(settings) == before
    config = folder / "config.json"
    os.utime(config, ns=(1, 1))
    changed = stamp_of(settings)
    assert {name for name in before if before[name] != changed[name]} == {str(config)}
    shutil.rmtree(folder)
    assert str(config) not in stamp_of(settings)
