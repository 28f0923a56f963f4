"""From an engine's settings to a running engine and all it stands on, in the engine process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmserve.checkpoint import Checkpoint
from llmserve.engine.engine import Engine
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.engine.step_log import StepLog, open_log
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Runner, RunnerInfo
from llmserve.runners.registry import load_runner
from llmserve.startup import EngineOptions, start_engine

from .grammar_queue import GrammarQueue
from .messages import EngineSettings

__all__ = ["LoadedEngine", "engine_options", "grammar_queue", "loaded_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine, and what its server must know of it."""

    engine: Engine
    info: RunnerInfo
    draft_info: RunnerInfo | None
    """Of the model that guesses, where there is one."""


@contextlib.contextmanager
def loaded_engine(
    settings: EngineSettings, *, before_trials: Callable[[], object] = lambda: None
) -> Iterator[LoadedEngine]:
    """Load the models, start the engine, and free everything in the end.

    `before_trials` is called when all is loaded and steps are about to be timed.

    Raises:
        CheckpointError: a model's folder cannot be used.
        ConfigError: a setting cannot be used, or the step log cannot be written.
    """
    with contextlib.ExitStack() as stack:
        watcher = None
        if settings.record is not None:
            watcher = StepLog(stack.enter_context(open_log(Path(settings.record))))
        draft: Runner | None = None
        if settings.draft_model is not None:
            draft = stack.enter_context(contextlib.closing(_load_draft(settings)))
        runner = stack.enter_context(contextlib.closing(_load_runner(settings)))
        before_trials()
        yield LoadedEngine(
            engine=start_engine(
                runner, engine_options(settings), draft_runner=draft, watcher=watcher
            ),
            info=runner.info,
            draft_info=None if draft is None else draft.info,
        )


def engine_options(settings: EngineSettings) -> EngineOptions:
    """What is asked of the engine itself."""
    return EngineOptions(
        cache_bytes=settings.cache_bytes,
        max_seq_len=settings.max_seq_len,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        max_step_s=settings.max_step_s,
        has_prefix_cache=settings.has_prefix_cache,
        policy=settings.policy,
        tenant_weights=settings.tenant_weights,
        speculation=settings.speculation,
    )


def grammar_queue(settings: EngineSettings, info: RunnerInfo) -> GrammarQueue:
    """What compiles the grammars of requests for the model; its tokenizer is read at the first."""

    def load() -> GrammarCompiler:
        from llmserve.text.tokenizer import Tokenizer

        return GrammarCompiler(Tokenizer.load(settings.model), info)

    return GrammarQueue(load, timeout_s=settings.grammar_timeout_s)


def _load_runner(settings: EngineSettings) -> Runner:
    checkpoint = Checkpoint.open(settings.model, verify=False)
    if settings.runner == "fake":
        return FakeRunner.for_config(
            checkpoint.config,
            step_s=settings.fake_step_s,
            adapters=tuple(settings.adapters),
            fingerprint=checkpoint.fingerprint,
        )
    return load_runner(
        settings.runner,
        checkpoint,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        block_size=settings.block_size,
        deterministic=settings.deterministic,
        native=settings.native,
        adapters={name: Path(path) for name, path in settings.adapters.items()},
    )


def _load_draft(settings: EngineSettings) -> Runner:
    """The model that guesses; what it does cannot change a token, only the speed."""
    assert settings.draft_model is not None, "there is no draft model"
    checkpoint = Checkpoint.open(settings.draft_model, verify=False)
    if settings.runner == "fake":
        return FakeRunner.for_config(checkpoint.config, step_s=settings.fake_step_s)
    return load_runner(
        settings.runner,
        checkpoint,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        block_size=settings.block_size,
    )
