"""`llmserve lineage`: the chain of a trained and quantized model, and every way to break it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmserve.cli import main
from llmserve.durable import write_manifest
from llmserve.manifest import MANIFEST
from llmserve.training.lora_merge import merge_adapter
from llmserve.training.training_run import run_training
from support.finetuning import finetune, rows_for, tiny_finetune_recipe, write_rows
from support.training_runs import SilentReporter, tiny_recipe, write_text

TRAINED = ["data", "tokenizer", "config", "run", "checkpoint"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run, whose model is quantized, too."""
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "text.txt")
    run_training(tiny_recipe(steps=2), [str(text)], folder / "run", reporter=SilentReporter())
    model, small = folder / "run" / "model", folder / "run" / "small"
    options = ["--scheme", "int8", "--out", str(small), "--no-measure"]
    assert main(["quantize", str(model), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(made: Path) -> Path:
    """`made`, whose model is tuned with LoRA in another run, then to chats, merged, quantized."""
    rows = write_rows(made / "rows.jsonl", rows_for("text"))
    recipe = tiny_finetune_recipe(task="text", method="lora", steps=2, max_tokens=16)
    finetune(recipe, made / "run" / "model", rows, made / "tuned")
    chats = write_rows(
        made / "chats.jsonl", [{"prompt": str(n), "response": "a"} for n in range(9)]
    )
    template = made / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    recipe = dataclasses.replace(recipe, task="instruct", chat_template=str(template))
    finetune(recipe, made / "tuned" / "model", chats, made / "again")
    merge_adapter(made / "run" / "model", made / "tuned" / "adapter", made / "merged")
    options = ["--scheme", "int8", "--out", str(made / "again" / "small"), "--no-measure"]
    assert main(["quantize", str(made / "again" / "model"), *options]) == 0
    return made


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def chain(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0
) -> dict[str, str]:
    """Status of every stage, by name."""
    capsys.readouterr()
    assert main(["lineage", *map(str, arguments), "--json"]) == code
    return {row["stage"]: row["status"] for row in json.loads(capsys.readouterr().out)}


def test_everything_of_a_run_is_verified(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = chain(capsys, made / "run" / "model", "--text", made / "text.txt")
    assert statuses == dict.fromkeys([*TRAINED, "folder"], "verified")
    statuses = chain(capsys, made / "run" / "small")
    assert statuses == dict.fromkeys([*TRAINED, "quantization", "folder"], "verified")


def test_chain_is_printed_with_its_files(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", str(made / "run" / "small")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*TRAINED, "quantization", "folder"]
    assert "text.txt" in lines[0]
    assert "scheme int8" in lines[5]
    assert "made from model" in lines[5]


def test_model_alone_says_what_is_absent(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = copy / "alone"
    (copy / "run" / "model").rename(alone)
    statuses = chain(capsys, alone)
    assert {name for name, status in statuses.items() if status == "absent"} == {"data", "run"}
    assert set(statuses.values()) == {"absent", "verified"}
    statuses = chain(capsys, copy / "run" / "small")
    absent = {name for name, status in statuses.items() if status == "absent"}
    assert absent == {"config", "checkpoint", "quantization"}


@pytest.mark.parametrize(
    ("folder", "stages"),
    [
        ("tuned/model", ["finetune"]),
        ("merged", ["merge"]),
        ("again/model", ["finetune", "finetune-2"]),
        ("again/small", ["finetune", "finetune-2", "quantization"]),
    ],
)
def test_tuned_and_merged_models_are_verified_to_the_text(
    tuned: Path, capsys: pytest.CaptureFixture[str], folder: str, stages: list[str]
) -> None:
    statuses = chain(capsys, tuned / folder, "--text", tuned / "text.txt")
    assert statuses == dict.fromkeys([*TRAINED, *stages, "folder"], "verified")


@pytest.mark.parametrize(
    ("damage", "changed"),
    [
        (lambda made: flip(made / "tuned/model/model.safetensors"), {"finetune", "folder"}),
        (lambda made: rewrite(made / "tuned/run.json", '"seed": 0', '"seed": 1'), {"finetune"}),
    ],
)
def test_changed_fine_tuning_is_named(
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    changed: set[str],
) -> None:
    shutil.copytree(tuned, tmp_path / "made")
    damage(tmp_path / "made")
    statuses = chain(capsys, tmp_path / "made" / "tuned" / "model", code=1)
    assert {name for name, status in statuses.items() if status == "changed"} == changed


def test_tuned_model_without_its_base_says_what_is_absent(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tuned / "tuned", tmp_path / "tuned")
    statuses = chain(capsys, tmp_path / "tuned" / "model")
    absent = {name for name, status in statuses.items() if status == "absent"}
    assert absent == {"data", "config", "run", "checkpoint"}
    assert set(statuses.values()) == {"absent", "verified"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, old: str, new: str) -> None:
    """Change a file, and the manifest of a model folder with it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    if (path.parent / MANIFEST).is_file():
        write_manifest(path.parent)


@pytest.mark.parametrize(
    ("damage", "changed"),
    [
        (lambda run: flip(run / "tokens" / "train-00000.bin"), {"data"}),
        (lambda run: flip(run / "model" / "model.safetensors"), {"checkpoint", "folder"}),
        (lambda run: rewrite(run / "model/tokenizer.json", '"the"', '"thE"'), {"tokenizer"}),
        (lambda run: rewrite(run / "model/config.json", '"silu"', '"silu" '), set()),
        (lambda run: rewrite(run / "model/config.json", "1e-05", "2e-05"), {"config"}),
        (lambda run: rewrite(run / "run.json", '"seed": 0', '"seed": 1'), {"run"}),
    ],
)
def test_what_changed_is_named(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    changed: set[str],
) -> None:
    damage(copy / "run")
    statuses = chain(capsys, copy / "run" / "model", code=int(bool(changed)))
    assert {name for name, status in statuses.items() if status == "changed"} == changed


def test_another_text_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "text.txt")
    statuses = chain(capsys, copy / "run/model", "--text", copy / "text.txt", code=1)
    assert statuses["data"] == "changed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no lineage.json"),
        ("{", "not valid JSON"),
        ('{"data": 3}', "data is no stage"),
        ('{"data": {"files": [{"name": "a"}]}}', "data is no stage"),
        ('{"data": {"files": 3}}', "data is no stage"),
    ],
)
def test_no_lineage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "lineage.json").write_text(content)
    assert main(["lineage", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
