"""The decoder: embedding, blocks, final norm, logits. One class for every variant of `ModelConfig`.

A token's path: its embedding, plus its position's where positions are learned or fixed; through
each block, attention then feed-forward, each normalized before and added to the residual stream;
the final norm; the product with the output layer.

Shapes: B batch, T tokens, E hidden_size, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .adapt import Adapt
from .attention import Attend, CausalAttention
from .layers import (
    Attention,
    Embedding,
    Linear,
    Mlp,
    RotaryTable,
    Rotation,
    make_norm,
    sinusoids,
)

__all__ = ["Block", "Transformer"]

_INIT_STD = 0.02  # GPT-2's


class Block(nn.Module):
    """Attention and feed-forward, each with its norm before it and a residual around it."""

    def __init__(self, config: ModelConfig, layer_index: int, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = Mlp(config, layer_index)
        self.dropout = dropout

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: Attend, adapt: Adapt | None = None
    ) -> Tensor:
        """[..., T, E] → [..., T, E]."""
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rotation, attend, adapt))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x), adapt))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class Transformer(nn.Module):
    """A decoder-only language model. New weights are random; see `initialize` and `weights.py`."""

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0) -> None:
        """Make the model with fresh weights from torch's global generator.

        Args:
            config: Shape and variant.
            dropout: Share of values zeroed after the embedding and in each residual branch, while
                training only. 0..1.
        """
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            Embedding(config.max_seq_len, config.hidden_size)
            if config.positions == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            Block(config, index, dropout) for index in range(config.num_layers)
        )
        self.norm = make_norm(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self._rotary = RotaryTable(config) if config.positions == "rope" else None
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: N(0, 0.02), smaller where they feed the residual stream.

        Projections into the residual stream are scaled by 1 / sqrt(2 · layers), so that its
        variance does not grow with depth (GPT-2); norms start at 1, biases at 0.
        """
        residual_std = _INIT_STD / (2 * self.config.num_layers) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    feeds_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    std = residual_std if feeds_residual else _INIT_STD
                    parameter.normal_(0.0, std, generator=generator)

    def hidden(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, adapt: Adapt | None = None
    ) -> Tensor:
        """The normalized output of the last block.

        Args:
            token_ids: [..., T], 0..V-1.
            positions: Place of each token in its sequence, [..., T] or [T], 0..max_seq_len-1.
            attend: Attention and what it keeps.
            adapt: Adapters of these tokens; None: the model alone.

        Returns:
            [..., T, E], in the type of the weights.
        """
        x = self.embed_tokens(token_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, self.config.hidden_size).to(x.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        rotation = None if self._rotary is None else self._rotary.rotation(positions, x.dtype)
        for block in self.layers:
            x = block(x, rotation, attend, adapt)
        normalized: Tensor = self.norm(x)
        return normalized

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] → float32 [..., V]. A bfloat16 model's are rounded to bfloat16 before."""
        output = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, output.weight).float()

    def forward(self, token_ids: Tensor, attend: Attend | None = None) -> Tensor:
        """Whole rows from position 0: token_ids [B, T] → float32 logits [B, T, V]."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        attend = attend or CausalAttention(self.config)
        return self.logits(self.hidden(token_ids, positions, attend))
