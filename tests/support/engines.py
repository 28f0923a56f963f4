"""An engine over the scripted runner, checked after every step."""

from __future__ import annotations

from collections.abc import Callable

from llmserve.engine.config import EngineConfig
from llmserve.engine.drafting import Drafter
from llmserve.engine.engine import Engine
from llmserve.engine.ngram import NgramDrafter
from llmserve.engine.request import Request, RequestOutput
from llmserve.engine.watcher import Watcher
from llmserve.runners.fake import Context, FakeRunner
from llmserve.runners.protocol import CacheGroup, Runner, RunnerInfo
from llmserve.sampling import SamplingParams

VOCAB = 97


def make_info(**changes: object) -> RunnerInfo:
    """A runner's description with a small vocabulary and no end id."""
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "max_seq_len": 256,
        "eos_token_ids": (),
        "cache_groups": (CacheGroup(num_layers=1, window=None, bytes_per_token=8),),
        "runner": "fake",
        "executed_form": "digest",
        "cache_dtype": "int64",
        "num_parameters": 0,
        "weight_bytes": 0,
        "hidden_size": 3,
    }
    return RunnerInfo(**{**values, **changes})  # type: ignore[arg-type]


def make_config(**changes: object) -> EngineConfig:
    """A small engine's settings; `num_blocks` may be one number for a single pool."""
    values: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_seq_len": 128,
        "max_batched_tokens": 32,
        "max_num_seqs": 16,
        **changes,
    }
    if isinstance(values["num_blocks"], int):
        values["num_blocks"] = (values["num_blocks"],)
    return EngineConfig(**values)  # type: ignore[arg-type]


def make_engine(
    runner: Runner | None = None,
    *,
    drafter: Drafter | None = None,
    watcher: Watcher | None = None,
    **changes: object,
) -> Engine:
    """A small engine over a scripted runner; `changes` are fields of `EngineConfig`."""
    config = make_config(**changes)
    if config.speculation is not None and drafter is None:
        drafter = NgramDrafter(config.speculation)
    return Engine(runner or FakeRunner(make_info()), config, drafter=drafter, watcher=watcher)


def make_request(request_id: str, prompt: list[int], **changes: object) -> Request:
    """A greedy request; `changes` are fields of `Request` or of `SamplingParams`."""
    fields = {name: changes.pop(name) for name in list(changes) if name in Request.__slots__}
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **changes})  # type: ignore[arg-type]
    values: dict[str, object] = {"seed": 1, **fields}
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling_params=params, **values)  # type: ignore[arg-type]


def run(
    engine: Engine, *, each_step: Callable[[Engine], None] | None = None
) -> list[RequestOutput]:
    """Step until the engine is idle, checking its invariants after every step."""
    outputs = []
    now = 0.0
    while engine.has_work:
        now += 1.0
        assert now < 10_000, "the engine makes no progress"
        outputs += engine.step(now)
        engine.check()
        if each_step is not None:
            each_step(engine)
    return outputs


def tokens_by_choice(outputs: list[RequestOutput]) -> dict[tuple[str, int], list[int]]:
    """What each choice of each request generated."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        tokens.setdefault((output.request_id, output.choice_index), []).extend(output.token_ids)
    return tokens


def expected(prompt: list[int], count: int) -> list[int]:
    """The ids that follow `prompt` by the scripted runner's rule, computed without an engine."""
    context, made = Context(prompt), []
    for _ in range(count):
        made.append(context.digest() % VOCAB)
        context.append(made[-1])
    return made
