"""The shape of a model, in one class for every variant that llmserve builds or opens.

How these fields are spelled in other programs' `config.json` is the business of `families.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from .config_checks import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCAB_SIZE,
    MAX_WIDTH,
    check_choice,
    check_count,
    check_flag,
    check_layers,
    check_positive,
)
from .config_parts import Experts, Head, RopeScaling
from .errors import ConfigError

__all__ = ["Experts", "Head", "ModelConfig", "RopeScaling"]


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
    local_rope_theta: float | None = None
    """Base in layers with the sliding window, unstretched; None: as in the others (Gemma 3)."""
    rotary_dim: int | None = None
    """Values of each head, its first ones, that rotary positions turn; None: all."""
    sliding_window: int | None = None
    """Tokens that a query sees, its own included; None: all before it."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers without the window, ascending; only beside `sliding_window`."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization around each half block and at the end; `layernorm` has a bias."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    norm_weight_offset: float = 0.0
    """Added to the stored weights of every RMSNorm; Gemma's are stored less 1."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """A norm before each half block, after it (within the residual: OLMo 2), or both (Gemma)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys before positions: of each head, or of all heads together."""
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward: a gate of SiLU or tanh-approximated GELU, or one layer of either GELU."""
    experts: Experts | None = None
    """Several feed-forwards in a layer; None: one."""
    embedding_scale: float = 1.0
    """Factor of the embeddings, not of a tied output layer."""
    attention_scale: float | None = None
    """Factor of the products of queries and keys; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scaled products s become cap · tanh(s / cap); None: they stay (Gemma 2)."""
    logits_softcap: float | None = None
    """The same for logits."""
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias on the feed-forward's projections."""
    tie_word_embeddings: bool = True
    """Whether the output layer is the embedding's transpose."""
    head: Head | None = None
    """What takes the place of the output layer; None: nothing does."""
    bos_token_id: int | None = None
    """Id put before a text, where the tokenizer does so."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a text."""
    pad_token_id: int | None = None
    """Id of padding, where the tokenizer has one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights on disk and, unless told otherwise, of the arithmetic."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_positions()
        self._check_norms()
        self._check_scores()
        self._check_windows()
        self._check_experts()
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
        return self.activation in ("swiglu", "geglu_tanh")

    @property
    def rotary_size(self) -> int:
        """Values of each head that rotary positions turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def score_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window_of(self, layer_index: int) -> int | None:
        """Tokens that a query of the layer sees, its own included; None: all before it."""
        return None if layer_index in self.full_attention_layers else self.sliding_window

    def has_local_rope(self, layer_index: int) -> bool:
        """Whether the layer's rotary frequencies are those of `local_rope_theta`."""
        return self.local_rope_theta is not None and self.window_of(layer_index) is not None

    def has_experts(self, layer_index: int) -> bool:
        """Whether the layer has experts, and not one plain feed-forward."""
        return self.experts is not None and layer_index not in self.experts.dense_layers

    def settings_beyond(self, known: Collection[str]) -> list[str]:
        """Names of fields outside `known` that are not at their default.

        For programs that execute some models and not others: what they do not know, a field that
        is added later too, they can refuse by name.
        """
        return [
            field.name
            for field in fields(self)
            if field.name not in known and getattr(self, field.name) != field.default
        ]

    def _check_sizes(self) -> None:
        check_count("vocab_size", self.vocab_size, MAX_VOCAB_SIZE)
        check_count("num_layers", self.num_layers, MAX_LAYERS)
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            check_count(name, getattr(self, name), MAX_WIDTH)
        check_count("intermediate_size", self.intermediate_size, 4 * MAX_WIDTH)
        check_count("max_seq_len", self.max_seq_len, MAX_CONTEXT)
        check_choice("activation", self.activation, ("swiglu", "geglu_tanh", "gelu", "gelu_tanh"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for name in ("attention_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings"):
            check_flag(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
            )

    def _check_positions(self) -> None:
        check_choice("positions", self.positions, ("rope", "learned", "sinusoidal", "none"))
        check_positive("rope_theta", self.rope_theta)
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ConfigError(
                f"hidden_size must be even for sinusoidal positions, got {self.hidden_size}"
            )
        if self.positions == "rope":
            self._check_rope()
            return
        for name in ("rope_scaling", "local_rope_theta", "rotary_dim"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} needs positions 'rope', not {self.positions!r}")

    def _check_rope(self) -> None:
        if self.rotary_dim is None and self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.rotary_dim is not None:
            check_count("rotary_dim", self.rotary_dim, self.head_dim)
            if self.rotary_dim % 2:
                raise ConfigError(f"rotary_dim must be even, got {self.rotary_dim}")
        if self.local_rope_theta is not None:
            check_positive("local_rope_theta", self.local_rope_theta)
            if self.sliding_window is None:
                raise ConfigError("local_rope_theta needs sliding_window")

    def _check_norms(self) -> None:
        check_choice("norm", self.norm, ("rmsnorm", "layernorm"))
        check_positive("norm_eps", self.norm_eps)
        check_choice("norm_weight_offset", self.norm_weight_offset, (0.0, 1.0))
        check_choice("norm_placement", self.norm_placement, ("pre", "post", "both"))
        check_choice("qk_norm", self.qk_norm, ("none", "head", "full"))
        if self.norm != "rmsnorm" and (self.qk_norm != "none" or self.norm_weight_offset):
            raise ConfigError("qk_norm and norm_weight_offset need norm 'rmsnorm'")

    def _check_scores(self) -> None:
        check_positive("embedding_scale", self.embedding_scale)
        for name in ("attention_scale", "attention_softcap", "logits_softcap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    def _check_windows(self) -> None:
        full = self.full_attention_layers
        if self.sliding_window is None:
            if full:
                raise ConfigError("full_attention_layers needs sliding_window")
            return
        check_count("sliding_window", self.sliding_window, MAX_CONTEXT)
        check_layers("full_attention_layers", full, self.num_layers)
        if len(full) == self.num_layers:
            raise ConfigError(
                "full_attention_layers names every layer; leave out sliding_window instead"
            )

    def _check_experts(self) -> None:
        if self.experts is None:
            return
        dense = self.experts.dense_layers
        check_layers("experts.dense_layers", dense, self.num_layers)
        if len(dense) == self.num_layers:
            raise ConfigError("experts.dense_layers names every layer; leave out experts instead")
        total = self.experts.num_experts * (self.num_layers - len(dense))
        check_count("experts.num_experts, over all layers,", total, MAX_EXPERTS)
        if not self.is_gated or self.mlp_bias:
            raise ConfigError("experts need a gated activation, and no mlp_bias")
