"""What a run tells about itself while it goes on: log, event file, page, and words.

Lines of the log about steps hold the means since the line before (`loss`, `grad_norm`,
`tokens_per_s`, and `mfu`, the share of the machine's peak that the model's arithmetic took), the
step with the highest loss (`loss_max_step`, `loss_max`), the number of `skipped` steps, the last
step's `learning_rate` and its `grad_norms` and `update_ratios` by layer (`monitor_layers.py`), and
for layers of experts `expert_load`, how many times its even share the busiest expert got. Lines
about evaluations hold `held_out_loss` and `dead_units` by layer.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor

from llmserve.durable import write_bytes

from .log import TrainingLog, read_log
from .monitor_diagnosis import Finding, RunFacts, diagnose
from .monitor_page import render_page
from .monitor_tensorboard import EventFile
from .run_folder import RunFolder
from .trainer import StepResult

__all__ = ["Monitor"]

_PAGE_GROWTH = 1.02
"""How much longer the log has become when the page is made anew: work for all pages together then
grows as the log does, not as its square."""


class Monitor:
    """The files that a run's first process writes about it; leaving the block closes them."""

    def __init__(
        self,
        folder: RunFolder,
        facts: RunFacts,
        *,
        title: str,
        step: int,
        flops_per_token: int,
        peak_flops: float,
    ) -> None:
        """`step` are done; what was logged after them is dropped."""
        self._folder, self._facts, self._title = folder, facts, title
        self._log = TrainingLog(folder.log, last_step=step)
        self._num_lines, self._lines_on_page = len(read_log(folder.log)), 0
        self._events = EventFile(folder.tensorboard, first_step=step + 1)
        self._flops_share = flops_per_token / peak_flops
        self._results: list[tuple[int, StepResult]] = []
        self._skipped = self._skipped_unsaid = 0

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._log.__exit__(kind, error, traceback)
        self._events.close()

    def take(self, step: int, result: StepResult) -> None:
        """Remember what `step` gave, for the next line."""
        if result.is_skipped:
            self._skipped += 1
        else:
            self._results.append((step, result))

    def write_steps(
        self, step: int, *, tokens: int, seconds: float, counts: dict[int, Tensor]
    ) -> dict[str, Any] | None:
        """Log the steps since the last line, of `tokens` each; None if all were skipped.

        Args:
            step: The last of them.
            tokens: What one step reads.
            seconds: What they took together.
            counts: Choices of experts by layer (`RouterWatch.take_counts`).
        """
        results, skipped = self._results, self._skipped
        self._results, self._skipped = [], 0
        if not results:
            self._skipped_unsaid += skipped
            return None
        tokens_per_s = tokens * (len(results) + skipped) / seconds
        worst_step, worst = max(results, key=lambda result: result[1].loss)
        last = results[-1][1]
        line: dict[str, Any] = {
            "step": step,
            "loss": sum(result.loss for _, result in results) / len(results),
            "loss_max": worst.loss,
            "loss_max_step": worst_step,
            "learning_rate": last.learning_rate,
            "grad_norm": sum(result.grad_norm for _, result in results) / len(results),
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self._flops_share,
            "skipped": skipped + self._skipped_unsaid,
        }
        self._skipped_unsaid = 0
        if last.layers is not None:
            line["grad_norms"] = last.layers.grad_norms
            line["update_ratios"] = last.layers.update_ratios
        if counts:
            line["expert_load"] = {
                f"layer {layer}": float(count.max() / count.mean())
                for layer, count in counts.items()
            }
        self._write(line)
        return line

    def write_evaluation(self, step: int, loss: float, dead_units: dict[str, float]) -> None:
        """Log an evaluation, and bring the page up to date if there is enough that is new."""
        self._write({"step": step, "held_out_loss": loss, "dead_units": dead_units})
        if self._num_lines >= _PAGE_GROWTH * self._lines_on_page:
            self.write_page()

    def write_page(self) -> list[Finding]:
        """Write the page anew; what it says in words."""
        lines = read_log(self._folder.log)
        self._lines_on_page = len(lines)
        findings = diagnose(lines, self._facts)
        write_bytes(self._folder.page, render_page(self._title, lines, findings).encode())
        return findings

    def _write(self, line: dict[str, Any]) -> None:
        self._num_lines += 1
        self._log.write(line)
        self._events.write(line)
