"""How an engine process is to be set up: what the API process hands to the loader."""

from __future__ import annotations

import msgspec

from llmserve.engine.config import PolicyName, SpeculationConfig
from llmserve.runners.native_options import NativeOptions

__all__ = ["EngineSettings"]


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine process is to be set up."""

    model: str
    """The model folder; its files were verified by the API process."""
    runner: str
    """A name of `llmserve.runners.registry.RUNNERS`, or `fake`."""
    dtype: str | None = None
    """Type of the arithmetic; None: as the folder says."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    threads: int | None = None
    """Threads for one step; None: the library's own choice."""
    deterministic: bool = False
    """Answers equal bit for bit whatever else is in the batch; slower."""
    tensor_parallel_size: int = 1
    """Processes that compute `model` together, on the torch runner."""
    enforce_eager: bool = False
    """On CUDA: a step's kernels are started one by one, in place of captured graphs."""
    native: NativeOptions | None = None
    """Options of the native runner, for `model`; the cache's type is torch's too."""
    adapters: dict[str, str] = {}
    """LoRA adapters by name, each a folder."""
    max_seq_len: int | None = None
    """Tokens of context; None: the model's."""
    max_num_seqs: int = 64
    """Most sequences running at once."""
    max_batched_tokens: int | None = None
    """Most tokens in one step; None: as many as `max_step_s` allows, found by trying."""
    max_prefill_tokens: int = 0
    far_token_weight: float = 1.0
    """Where that number is given: both as in `EngineConfig`."""
    max_step_s: float | None = None
    """Longest time of a full step, where its size is found by trying; None: by the model's own."""
    cache_bytes: int = 256 << 20
    """Memory for the KV cache."""
    block_size: int = 16
    """Tokens in one KV block."""
    has_prefix_cache: bool = True
    """Whether blocks are shared between requests with equal beginnings."""
    policy: PolicyName = "fcfs"
    """Who is served first."""
    tenant_weights: dict[str, float] = {}
    """Shares of tenants under the policy `fair`."""
    speculation: SpeculationConfig | None = None
    """How tokens are guessed ahead; None: not at all."""
    draft_model: str | None = None
    """Folder of the model that guesses, for the method `draft`."""
    grammar_timeout_s: float = 1.0
    """Time for compiling the grammar of one request."""
    log_format: str = "text"
    """How loader and engines write their log: `text` or `json`."""
    handover_bytes: int = 0
    """Memory through which engines that only read prompts hand KV blocks over; 0: there are none
    such."""
    record: str | None = None
    """File for the engine's step log; None: none is written."""
    fake_step_s: float = 0.0
    """For the runner `fake`: the least time of a step."""
