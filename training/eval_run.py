"""Scoring a model on tasks: by its head, by log-likelihood, by greedy answers, by loss.

Choices and answers go through the engine that serves, so that a score is that of the served model;
heads and losses through the model in torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.llm import LLM
from llmserve.model.weights import load_model
from llmserve.sampling import SamplingParams
from llmserve.text.tokenizer import Tokenizer

from .eval_scores import (
    Interval,
    accuracy,
    bootstrap,
    confusion,
    exact_match,
    f1_scores,
    macro_f1,
    token_f1,
)
from .eval_task_file import EvalTask
from .eval_text import evaluate_texts
from .finetune_examples import Lengths
from .finetune_model import TunedModel
from .finetune_task import Task
from .heads_classify import ClassifyTask
from .heads_span import SpanTask

__all__ = ["Evaluation"]


class Evaluation:
    """A model under evaluation. Leaving its `with` block frees it."""

    def __init__(
        self,
        folder: Path,
        *,
        runner: str = "auto",
        context: int | None = None,
        stride: int | None = None,
        seed: int = 0,
    ) -> None:
        """Open the model folder.

        Args:
            folder: The model folder.
            runner: What computes choices and answers (`llmserve.runners.registry.RUNNERS`).
            context: Tokens of a window in texts; None: the model's context.
            stride: Tokens that count in each window; None: all.
            seed: Of the intervals' resampling.

        Raises:
            CheckpointError: the folder cannot be used.
        """
        self.checkpoint = Checkpoint.open(folder)
        self._tokenizer = Tokenizer.load(folder)
        self._runner, self._context, self._stride, self._seed = runner, context, stride, seed
        self._tuned: TunedModel | None = None
        self._llm: LLM | None = None

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._llm is not None:
            self._llm.close()

    def run(self, task: EvalTask) -> dict[str, Any]:
        """Figures of one task, each with its 95 % interval, and how many rows it had.

        Raises:
            ConfigError: the model has no head for the task, or a head in place of its logits.
            DataError: a row that is not of the task's shape, named by its place.
        """
        compute = {
            "choice": self._choice,
            "generate": self._generate,
            "classify": self._classify,
            "span": self._span,
            "text": self._text,
        }[task.kind]
        figures = {name: dataclasses.asdict(value) for name, value in compute(task).items()}
        return {"task": task.name, "kind": task.kind, "rows": len(task.rows), "figures": figures}

    def run_texts(self, name: str, documents: Sequence[str]) -> dict[str, Any]:
        """The loss on documents, as `run` gives it.

        Raises:
            ConfigError: the model has a head in place of its logits, or a bad context or stride.
            DataError: nothing to predict.
        """
        figures = evaluate_texts(
            self._torch_model(None).model,
            self._tokenizer,
            documents,
            context=self._context,
            stride=self._stride,
            seed=self._seed,
        )
        values = dataclasses.asdict(figures)
        intervals = {name: value for name, value in values.items() if isinstance(value, dict)}
        counts = {name: value for name, value in values.items() if not isinstance(value, dict)}
        return {
            "task": name,
            "kind": "text",
            "rows": counts.pop("num_documents"),
            **counts,
            "figures": intervals,
        }

    def _text(self, task: EvalTask) -> dict[str, Interval]:
        found = self.run_texts(task.name, [row.text("text") for row in task.rows])
        return {name: Interval(**values) for name, values in found["figures"].items()}

    def _choice(self, task: EvalTask) -> dict[str, Interval]:
        prompts, choices, right = [], [], []
        for row in task.rows:
            options = task.choices_of(row)
            prompts += [self._prompt(task, task.prompt_of(row))] * len(options)
            choices.append(options)
            right.append(task.right_choice(row))
        flat = [choice for options in choices for choice in options]
        scores = iter([score.logprob for score in self._engine().score(prompts, flat)])
        hits = []
        for options, place in zip(choices, right, strict=True):
            values = [next(scores) for _ in options]
            per_byte = [v / len(o.encode()) for v, o in zip(values, options, strict=True)]
            hits.append([float(np.argmax(v) == place) for v in (values, per_byte)])
        return self._means(np.array(hits), ("accuracy", "accuracy_per_byte"))

    def _generate(self, task: EvalTask) -> dict[str, Interval]:
        wanted = [task.right_answers(row) for row in task.rows]
        params = SamplingParams(temperature=0.0, max_tokens=task.max_new_tokens, stop=task.stop)
        prompts = [self._prompt(task, task.prompt_of(row)) for row in task.rows]
        found = [completion.text for completion in self._engine().generate(prompts, params)]
        pairs = list(zip(found, wanted, strict=True))
        hits = [[exact_match(*pair), token_f1(*pair)] for pair in pairs]
        return self._means(np.array(hits), ("exact_match", "token_f1"))

    def _classify(self, task: EvalTask) -> dict[str, Interval]:
        model = self._torch_model("sequence")
        labels = model.config.head.labels if model.config.head is not None else ()
        learner = ClassifyTask(self._tokenizer, labels)
        examples = self._examples(learner, task)
        with torch.no_grad():
            found = learner.predict(model, examples)
        parts = confusion([labels[example.label] for example in examples], found, labels)
        figures = {
            "accuracy": bootstrap(parts, accuracy, seed=self._seed),
            "macro_f1": bootstrap(parts, macro_f1, seed=self._seed),
        }
        for place, label in enumerate(labels):
            figures[f"f1_{label}"] = bootstrap(parts, partial(_f1_of, place), seed=self._seed)
        return figures

    def _span(self, task: EvalTask) -> dict[str, Interval]:
        model, learner = self._torch_model("span"), SpanTask(self._tokenizer)
        examples = self._examples(learner, task)
        with torch.no_grad():
            found = learner.predict(model, examples)
        pairs = list(zip(found, (example.answers for example in examples), strict=True))
        hits = [[exact_match(*pair), token_f1(*pair)] for pair in pairs]
        return self._means(np.array(hits), ("exact_match", "token_f1"))

    def _means(self, hits: npt.NDArray[np.float64], names: Sequence[str]) -> dict[str, Interval]:
        """Means of the columns [rows, figures]."""
        return {
            name: bootstrap(
                np.stack([hits[:, place], np.ones(len(hits))], axis=1),
                lambda sums: float(sums[0] / sums[1]),
                seed=self._seed,
            )
            for place, name in enumerate(names)
        }

    def _examples(self, learner: Task[Any], task: EvalTask) -> list[Any]:
        lengths = Lengths(self.checkpoint.config.max_seq_len, "truncate")
        made = [learner.example(row, lengths) for row in task.rows]
        return [example for example in made if example is not None]

    def _prompt(self, task: EvalTask, text: str) -> str | list[int]:
        if not task.chat:
            return text
        return self._engine().render_chat([{"role": "user", "content": text}])

    def _engine(self) -> LLM:
        if self._llm is None:
            self._llm = LLM(self.checkpoint.path, runner=self._runner, verify=False)
        return self._llm

    def _torch_model(self, head: str | None) -> TunedModel:
        found = self.checkpoint.config.head
        if (found.kind if found else None) != head:
            raise ConfigError(
                f"{self.checkpoint.path}: has {f'a {found.kind} head' if found else 'no head'}; "
                f"the task needs {f'a {head} head' if head else 'a model with logits'}"
            )
        if self._tuned is None:
            model = load_model(self.checkpoint, dtype=torch.float32)
            self._tuned = TunedModel(model, None, {})
        return self._tuned


def _f1_of(place: int, sums: npt.NDArray[np.float64]) -> float:
    """F1 of one label; 0 where it occurs on neither side."""
    return float(np.nan_to_num(f1_scores(sums)[place]))
