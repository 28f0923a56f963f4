"""Task files: what a model is to be scored on, in TOML, or rows of prompts in JSON lines.

    kind = "choice"                       # or generate, classify, span, text
    data = "questions.jsonl"              # one file or several, beside the task file
    prompt = "Question: {question}\\nAnswer:"
    choices = [" yes", " no"]             # or the name of the field that holds a list
    answer = "label"                      # the field with the right choice, or its number

A `.jsonl` file is a task by itself: its rows hold a prompt, an answer and, where one of several
continuations is to be found, choices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from llmserve.errors import ConfigError, DataError

from .finetune_rows import Row, read_rows
from .recipe_fields import check_type, read_toml

__all__ = ["EvalTask", "read_task"]

Kind = Literal["choice", "generate", "classify", "span", "text"]
_FIELD = re.compile(r"\{(\w+)\}")
_UNTYPED = ("data", "columns", "choices", "stop", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalTask:
    """One task and its rows. Raises `ConfigError` for a setting that cannot be used."""

    name: str
    """What the results call it."""
    kind: Kind
    """The likeliest of several continuations; a greedy answer; a classifier's label; a span
    head's answer; or the loss on documents."""
    rows: tuple[Row, ...] = field(default=(), repr=False)
    """What it asks; not in the file."""
    data: tuple[str, ...] = ()
    """Files of rows."""
    data_format: Literal["auto", "jsonl", "json", "csv", "tsv"] = "auto"
    """Their format."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field → the data's."""
    prompt: str = "{prompt}"
    """choice, generate: the prompt, with fields of the row in braces."""
    choices: tuple[str, ...] | str = "choices"
    """choice: the continuations, with fields in braces, or the field that holds a list of them."""
    answer: str = "answer"
    """choice, generate: the field with the right answer, its place among the choices, or a list of
    answers that are right."""
    chat: bool = False
    """choice, generate: whether the prompt is a user's message in the model's chat template."""
    max_new_tokens: int = 64
    """generate: most tokens of an answer."""
    stop: tuple[str, ...] = ()
    """generate: texts that end an answer."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            if each.name not in _UNTYPED:
                check_type(each.name, getattr(self, each.name), hints[each.name])
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def prompt_of(self, row: Row) -> str:
        """The prompt for a row. Raises `DataError` where a field is missing."""
        return _filled(self.prompt, row)

    def choices_of(self, row: Row) -> list[str]:
        """The continuations for a row. Raises `DataError` unless there are two strings or more."""
        if isinstance(self.choices, str):
            found = row.values.get(self.choices)
        else:
            found = [_filled(choice, row) for choice in self.choices]
        if not isinstance(found, list) or len(found) < 2 or not all(_is_text(c) for c in found):
            raise DataError(f"{row.place}: needs two or more choices that are texts, got {found!r}")
        return found

    def right_choice(self, row: Row) -> int:
        """Place of the right continuation. Raises `DataError` where the row does not name one."""
        choices, answer = self.choices_of(row), row.values.get(self.answer)
        if isinstance(answer, str):
            stripped = [choice.strip() for choice in choices]
            if answer.strip() in stripped:
                return stripped.index(answer.strip())
        elif isinstance(answer, int) and 0 <= answer < len(choices):
            return answer
        raise DataError(
            f"{row.place}: {self.answer!r} is {answer!r}, neither one of the choices nor its place"
        )

    def right_answers(self, row: Row) -> tuple[str, ...]:
        """Texts that count as right. Raises `DataError` where the row has none."""
        answer = row.values.get(self.answer)
        answers = answer if isinstance(answer, list) else [answer]
        if not answers or not all(_is_text(text) for text in answers):
            raise DataError(
                f"{row.place}: {self.answer!r} must be a text or a list, got {answer!r}"
            )
        return tuple(answers)


def read_task(path: Path, *, limit: int | None = None) -> EvalTask:
    """The task in the file at `path`, with its first `limit` rows.

    Raises:
        ConfigError: the file cannot be read, or has an unknown or unusable setting.
        DataError: its data cannot be used.
    """
    if path.suffix == ".jsonl":
        rows = read_rows([path])
        kind: Kind = "choice" if "choices" in rows[0].values else "generate"
        task = EvalTask(name=path.stem, kind=kind, rows=tuple(rows))
    else:
        task = _from_toml(path)
    return task if limit is None else replace(task, rows=task.rows[:limit])


def _from_toml(path: Path) -> EvalTask:
    values = read_toml(path)
    known = {each.name for each in fields(EvalTask)} - {"rows"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"{path}: unknown settings {unknown}; known: {sorted(known)}")
    for name in ("kind", "data"):
        if name not in values:
            raise ConfigError(f"{path}: needs {name!r}")
    try:
        task = EvalTask(**{"name": path.stem, **values, **_tuples(values)})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    sources = [path.parent / source for source in task.data]
    rows = read_rows(sources, data_format=task.data_format, columns=task.columns)
    return replace(task, rows=tuple(rows))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of texts as tuples; one file may be named without a list."""
    made: dict[str, Any] = {}
    for name in ("data", "stop", "choices"):
        value = values.get(name)
        if isinstance(value, str) and name != "choices":
            value = [value]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            made[name] = tuple(value)
        elif value is not None and not isinstance(value, str):
            raise ConfigError(f"{name} must be a text or a list of texts, got {value!r}")
    columns = values.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(c, str) for c in columns.values()):
        raise ConfigError(f"columns must be a table of names, got {columns!r}")
    return made


def _filled(template: str, row: Row) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in row.values:
            raise DataError(f"{row.place}: no field {match[1]!r}; it has {sorted(row.values)}")
        return str(row.values[match[1]])

    return _FIELD.sub(value, template)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
