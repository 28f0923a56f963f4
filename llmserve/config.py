"""The shape of a model, in one class for every variant that llmserve builds or opens.

How these fields are spelled in other programs' `config.json` is the business of `families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

__all__ = ["ModelConfig", "RopeScaling"]

# Bounds against lying configurations (nothing is allocated before they are checked).
MAX_LAYERS = 512
MAX_WIDTH = 65_536
MAX_VOCAB_SIZE = 1 << 20
MAX_CONTEXT = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """A stretch of the rotary frequencies for contexts longer than the training's."""

    kind: Literal["linear", "llama3"]
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones (Llama 3.1)."""
    factor: float
    """How much longer the context became."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_seq_len / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths under original_max_seq_len / this are kept."""
    original_max_seq_len: int = 8192
    """llama3: the context of the training."""

    def __post_init__(self) -> None:
        _choice("rope_scaling.kind", self.kind, ("linear", "llama3"))
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive(f"rope_scaling.{name}", getattr(self, name))
        _count("rope_scaling.original_max_seq_len", self.original_max_seq_len, MAX_CONTEXT)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must be above "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that determines a decoder's parameters and its forward pass.

    Raises `ConfigError` for a value outside its range or a combination that makes no model.
    """

    vocab_size: int
    """Rows of the embedding and width of the logits."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Blocks of attention and feed-forward."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides `num_heads` (1: multi-query, equal: multi-head)."""
    head_dim: int
    """Width of one head; even where positions are rotary."""
    intermediate_size: int
    """Width inside the feed-forward."""
    max_seq_len: int
    """Tokens of context, prompt and answer together."""
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How a token's place reaches the model."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretch of the rotary frequencies."""
    sliding_window: int | None = None
    """Tokens that a query sees, its own included; None: all before it."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers without the window, ascending; only beside `sliding_window`."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization before each half block and at the end; `layernorm` has a bias."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward: gated SiLU, or one layer with exact or tanh-approximated GELU."""
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias on the feed-forward's projections."""
    tie_word_embeddings: bool = True
    """Whether the output layer is the embedding's transpose."""
    bos_token_id: int | None = None
    """Id put before a text, where the tokenizer does so."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a text."""
    pad_token_id: int | None = None
    """Id of padding, where the tokenizer has one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights on disk and, unless told otherwise, of the arithmetic."""

    def __post_init__(self) -> None:
        _count("vocab_size", self.vocab_size, MAX_VOCAB_SIZE)
        _count("num_layers", self.num_layers, MAX_LAYERS)
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            _count(name, getattr(self, name), MAX_WIDTH)
        _count("intermediate_size", self.intermediate_size, 4 * MAX_WIDTH)
        _count("max_seq_len", self.max_seq_len, MAX_CONTEXT)
        _positive("rope_theta", self.rope_theta)
        _positive("norm_eps", self.norm_eps)
        _choice("positions", self.positions, ("rope", "learned", "sinusoidal", "none"))
        _choice("norm", self.norm, ("rmsnorm", "layernorm"))
        _choice("activation", self.activation, ("swiglu", "gelu", "gelu_tanh"))
        _choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ConfigError(
                f"hidden_size must be even for sinusoidal positions, got {self.hidden_size}"
            )
        if self.rope_scaling is not None and self.positions != "rope":
            raise ConfigError(f"rope_scaling needs positions 'rope', not {self.positions!r}")
        self._check_windows()
        for token_id in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"special token id {token_id} is outside the vocabulary of {self.vocab_size}"
                )

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, or all value heads, together."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward has a gate beside its input projection."""
        return self.activation == "swiglu"

    def window_of(self, layer_index: int) -> int | None:
        """Tokens that a query of the layer sees, its own included; None: all before it."""
        return None if layer_index in self.full_attention_layers else self.sliding_window

    def _check_windows(self) -> None:
        full = self.full_attention_layers
        if self.sliding_window is None:
            if full:
                raise ConfigError("full_attention_layers needs sliding_window")
            return
        _count("sliding_window", self.sliding_window, MAX_CONTEXT)
        is_listing = all(type(index) is int and 0 <= index < self.num_layers for index in full)
        if not is_listing or list(full) != sorted(set(full)):
            raise ConfigError(
                f"full_attention_layers must be layers from 0 to {self.num_layers - 1}, "
                f"ascending, got {list(full)}"
            )
        if len(full) == self.num_layers:
            raise ConfigError(
                "full_attention_layers names every layer; leave out sliding_window instead"
            )


def _count(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name} must be a whole number from 1 to {most}, got {value!r}")


def _positive(name: str, value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise ConfigError(f"{name} must be a positive number, got {value!r}")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
