"""From an engine's settings to a running engine and all it stands on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmserve.checkpoint import Checkpoint
from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.engine.prefix_transfer import ByteArray, shared_area
from llmserve.engine.step_log import StepLog, open_log
from llmserve.engine.watcher import Watcher, WatcherGroup
from llmserve.errors import EngineError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Runner, RunnerInfo
from llmserve.runners.registry import device_of_replica, load_runner, survives_fork
from llmserve.startup import EngineOptions, start_engine

from .engine_settings import EngineSettings
from .folder_stamp import Stamp, stamp_of
from .grammar_queue import GrammarQueue

__all__ = [
    "LoadedEngine",
    "LoadedModels",
    "engine_options",
    "grammar_compiler",
    "grammar_queue",
    "loaded_engine",
    "loaded_models",
    "loads_before_fork",
    "settings_at",
    "started_engine",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModels:
    """What an engine computes with."""

    runner: Runner
    draft: Runner | None
    """The model that guesses, where there is one."""
    stamp: Stamp
    """The files that they were loaded from."""
    area: ByteArray | None = None
    """Memory shared by all engines forked from here, for KV blocks on their way between them."""
    grammars: GrammarCompiler | None = None
    """Compiles grammars for the model; None: it is made when the first one comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine, and what its server must know of it."""

    engine: Engine
    info: RunnerInfo
    draft_info: RunnerInfo | None
    """Of the model that guesses, where there is one."""
    stamp: Stamp
    """The files that the models were loaded from."""
    grammars: GrammarCompiler | None = None
    """As in `LoadedModels`."""


def loads_before_fork(settings: EngineSettings) -> bool:
    """Whether the models may be loaded once and shared by all engines forked afterwards.

    Raises:
        CheckpointError: a model's folder cannot be used.
    """
    if settings.runner == "fake":
        return True
    folders = [settings.model, *filter(None, [settings.draft_model])]
    return all(
        survives_fork(
            settings.runner,
            Checkpoint.open(folder, verify=False),
            dtype=settings.dtype,
            device=settings.device,
            block_size=settings.block_size,
            tensor_parallel_size=settings.tensor_parallel_size,
        )
        for folder in folders
    )


def settings_at(settings: EngineSettings, place: int) -> EngineSettings:
    """Those of the replica of that index: on CUDA with devices of its own, as far as there are."""
    device = device_of_replica(settings.device, place, num_ranks=settings.tensor_parallel_size)
    return msgspec.structs.replace(settings, device=device)


@contextlib.contextmanager
def loaded_models(settings: EngineSettings) -> Iterator[LoadedModels]:
    """Load the models, and free them in the end.

    Raises:
        CheckpointError: a model's folder cannot be used.
        ConfigError: a setting cannot be used.
    """
    with contextlib.ExitStack() as stack:
        stamp = stamp_of(settings)
        draft: Runner | None = None
        if settings.draft_model is not None:
            draft = stack.enter_context(contextlib.closing(_load_draft(settings)))
        runner = stack.enter_context(contextlib.closing(_load_runner(settings)))
        area = shared_area(settings.handover_bytes) if settings.handover_bytes else None
        yield LoadedModels(runner=runner, draft=draft, stamp=stamp, area=area)


@contextlib.contextmanager
def started_engine(
    settings: EngineSettings,
    models: LoadedModels,
    *,
    number: int = 0,
    config: EngineConfig | None = None,
    watcher: Watcher | None = None,
) -> Iterator[LoadedEngine]:
    """Start an engine over loaded models; its step log is closed in the end.

    Args:
        settings: Those that the models were loaded with.
        models: They are not freed here.
        number: Engines of the server before it: each but the first has its number behind the name
            of its step log.
        config: Sizes that an engine before it was given; None: they are planned.
        watcher: Is told what the engine does, beside the step log.

    Raises:
        ConfigError: a setting cannot be used, or the step log cannot be written.
    """
    with contextlib.ExitStack() as stack:
        watchers = [watcher] if watcher is not None else []
        if settings.record is not None:
            path = Path(f"{settings.record}.{number}" if number else settings.record)
            watchers.append(StepLog(stack.enter_context(open_log(path))))
        yield LoadedEngine(
            engine=start_engine(
                models.runner,
                engine_options(settings),
                config=config,
                draft_runner=models.draft,
                watcher=WatcherGroup(watchers) if len(watchers) > 1 else next(iter(watchers), None),
            ),
            info=models.runner.info,
            draft_info=None if models.draft is None else models.draft.info,
            stamp=models.stamp,
            grammars=models.grammars,
        )


@contextlib.contextmanager
def loaded_engine(settings: EngineSettings) -> Iterator[LoadedEngine]:
    """Load the models and start an engine over them, all in this process.

    Raises:
        CheckpointError: a model's folder cannot be used.
        ConfigError: a setting cannot be used, or the step log cannot be written.
    """
    with loaded_models(settings) as models, started_engine(settings, models) as loaded:
        yield loaded


def engine_options(settings: EngineSettings) -> EngineOptions:
    """What is asked of the engine itself."""
    return EngineOptions(
        cache_bytes=settings.cache_bytes,
        max_seq_len=settings.max_seq_len,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        max_prefill_tokens=settings.max_prefill_tokens,
        far_token_weight=settings.far_token_weight,
        max_step_s=settings.max_step_s,
        has_prefix_cache=settings.has_prefix_cache,
        policy=settings.policy,
        tenant_weights=settings.tenant_weights,
        speculation=settings.speculation,
    )


def grammar_queue(settings: EngineSettings, loaded: LoadedEngine) -> GrammarQueue:
    """What compiles the grammars of requests for the model; its tokenizer is read at the first,
    if it was not before.

    Grammars fail with an `EngineError` where the folder is not what was loaded any more.
    """
    inherited = loaded.grammars

    def load() -> GrammarCompiler:
        return inherited or grammar_compiler(settings, loaded.info, loaded.stamp)

    return GrammarQueue(load, timeout_s=settings.grammar_timeout_s)


def grammar_compiler(settings: EngineSettings, info: RunnerInfo, stamp: Stamp) -> GrammarCompiler:
    """Compiles grammars for a model that was loaded from files of that stamp.

    Raises:
        EngineError: the folder holds other files now.
        MissingDependencyError: llguidance is not installed.
    """
    from llmserve.text.tokenizer import Tokenizer

    if stamp_of(settings) != stamp:
        raise EngineError(
            f"files of {settings.model} were changed since the model was loaded, and grammars "
            "need its tokenizer: load the model anew"
        )
    return GrammarCompiler(Tokenizer.load(settings.model), info)


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
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=settings.enforce_eager,
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
        enforce_eager=settings.enforce_eager,
    )
