"""R28: what goes wrong with data and folders ends a training before its first step, with a reason.

Full disks, losses that are not finite and signals are in `test_training_resume.py`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llmserve.errors import DataError, TrainingError
from llmserve.training.run_folder import RunFolder
from llmserve.training.training_run import run_training
from support.finetuning import finetune, tiny_finetune_recipe, write_rows
from support.models import make_model_folder
from support.training_runs import SEPARATOR, SilentReporter, run_until, tiny_recipe, write_text

BAD_CORPORA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "no text"),
    "white space": ("a.txt", b" \n\t\n\n ", "no text"),
    "no UTF-8": ("a.txt", b"fine\xff", "byte 0xff at offset 4"),
    "cut in a character": ("a.txt", "wörd".encode()[:2], "UTF-8"),
    "UTF-16": ("a.txt", "some words".encode("utf-16"), "UTF-8"),
    "one document": ("a.txt", b"one document alone", "too little text"),
    "shorter than a window": ("a.txt", SEPARATOR.join("abcdefgh").encode(), "too little text"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
    "another field": ("a.jsonl", b'{"content": "a"}\n', "text"),
    "a number for a text": ("a.jsonl", b'{"text": 1}\n', "line 1"),
    "a list for an object": ("a.jsonl", b"[1]\n", "line 1"),
    "torn Parquet": ("a.parquet", b"PAR1" + bytes(40), "arquet"),
}


def train(text: Path, out: Path) -> None:
    run_training(tiny_recipe(), [str(text)], out, reporter=SilentReporter())


@pytest.mark.parametrize("kind", BAD_CORPORA)
def test_r28_bad_corpus_is_refused_before_the_first_step(tmp_path: Path, kind: str) -> None:
    name, content, message = BAD_CORPORA[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        train(path, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("run/**/*.safetensors"))
    assert not list(tmp_path.glob("run/training_log.jsonl"))


def test_r28_second_trainer_in_a_folder_leaves_and_the_first_is_not_disturbed(
    tmp_path: Path,
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    refused = tmp_path / "refused"

    def second() -> None:
        try:
            train(text, out)
        except TrainingError as error:
            refused.write_text(str(error))

    with RunFolder(out).locked():
        before = sorted(out.rglob("*"))
        assert run_until("", second) == 0
        assert f"process {os.getpid()}" in refused.read_text()
        assert sorted(out.rglob("*")) == before
    train(text, out)
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-2], lambda data: bytes([data[0] ^ 1]) + data[1:]]
)
def test_r28_damaged_shard_is_named_and_nothing_is_trained_on_it(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    status = run_until("train.micro_batch=kill@9", lambda: train(text, out))
    assert os.WTERMSIG(status) == signal.SIGKILL
    shard = out / "tokens" / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(damage(whole))
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        train(text, out)
    assert not (out / "model").exists()
    shard.write_bytes(whole)
    train(text, out)
    assert (out / "model" / "model.safetensors").exists()


def test_r28_label_outside_the_set_is_named_by_its_line(tmp_path: Path) -> None:
    rows = [{"text": f"message {n}", "label": "ab"[n % 2]} for n in range(99)]
    rows[17]["label"] = "spam"
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny_finetune_recipe(task="classify", labels="a,b")
    with pytest.raises(DataError, match="line 18: the label 'spam' is none of a, b"):
        finetune(recipe, make_model_folder(tmp_path / "base"), data, tmp_path / "run")
    assert not list(tmp_path.glob("run/**/*.safetensors"))
