"""The decoder: embedding, blocks, final norm, logits. One class for every variant of `ModelConfig`.

A token's path: its embedding, plus its position's where positions are learned or fixed; through
each block, attention then feed-forward, each normalized before or after and added to the residual
stream; the final norm; the product with the output layer.

Shapes: B batch, T tokens, E hidden_size, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..layouts import block_norms
from .adapt import Adapt
from .attention import Attend, CausalAttention
from .experts import MixtureOfExperts
from .half_blocks import Attention, Mlp
from .layers import Embedding, Linear, RotaryTable, Rotation, make_norm, sinusoids
from .scores import soft_cap

__all__ = ["Block", "Transformer"]

_INIT_STD = 0.02  # GPT-2's


class Block(nn.Module):
    """Attention and feed-forward, each with its norms and a residual around them."""

    def __init__(self, config: ModelConfig, layer_index: int, dropout: float) -> None:
        super().__init__()
        self._norms = block_norms(config)
        for name in filter(None, self._norms):
            self.add_module(name, make_norm(config))
        self.self_attn = Attention(config, layer_index)
        self.mlp: Mlp | MixtureOfExperts
        if config.has_experts(layer_index):
            self.mlp = MixtureOfExperts(config, layer_index)
        else:
            self.mlp = Mlp(config, layer_index)
        self.dropout = dropout

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: Attend, adapt: Adapt | None = None
    ) -> Tensor:
        """[..., T, E] → [..., T, E]."""
        norms = self._norms
        out = self.self_attn(self._norm(norms.before_attention, x), rotation, attend, adapt)
        x = x + self._drop(self._norm(norms.after_attention, out))
        inner = self._norm(norms.before_mlp, x)
        out = self.mlp(inner, adapt) if isinstance(self.mlp, Mlp) else self.mlp(inner)
        return x + self._drop(self._norm(norms.after_mlp, out))

    def _norm(self, name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return x
        normalized: Tensor = getattr(self, name)(x)
        return normalized

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
        has_output = config.head is None and not config.tie_word_embeddings
        self.lm_head = (
            Linear(config.hidden_size, config.vocab_size, bias=False) if has_output else None
        )
        self._add_head()
        self._is_local = [config.has_local_rope(index) for index in range(config.num_layers)]
        self._rotary = {
            is_local: RotaryTable(config, is_local=is_local)
            for is_local in set(self._is_local)
            if config.positions == "rope"
        }
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: N(0, 0.02), smaller where they feed the residual stream.

        Projections into the residual stream are scaled by 1 / sqrt(2 · layers), so that its
        variance does not grow with depth (GPT-2); norms start at a factor of 1, biases at 0.
        """
        residual_std = _INIT_STD / (2 * self.config.num_layers) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0 - self.config.norm_weight_offset)
                else:
                    feeds_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    std = residual_std if feeds_residual else _INIT_STD
                    parameter.normal_(0.0, std, generator=generator)

    def fix_shapes(self) -> None:
        """From now on let no product's shape depend on values, only on the number of tokens.

        For a model whose weights no longer change.
        """
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.fix_shapes()

    def complete_rotations(self, count: int, device: torch.device) -> None:
        """Make the rotations of all positions that will be asked for, those before `count`.

        For a device whose values the host does not await. They take 12 bytes for each position and
        each two rotated values of a head.
        """
        for table in self._rotary.values():
            table.complete(count, device)

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
        x = self.embed(token_ids, positions)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        rotations = self.rotations(positions, x.dtype)
        for block, rotation in zip(self.layers, rotations, strict=True):
            x = block(x, rotation, attend, adapt)
        normalized: Tensor = self.norm(x)
        return normalized

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> list[Rotation | None]:
        """How each block turns queries and keys at `positions`; None: not at all."""
        turns = {
            is_local: table.rotation(positions, dtype) for is_local, table in self._rotary.items()
        }
        return [turns.get(is_local) for is_local in self._is_local]

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads: [..., T] → [..., T, E]; arguments as in `hidden`."""
        x: Tensor = self.embed_tokens(token_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' type, as Gemma's was in training.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, self.config.hidden_size).to(x.dtype)
        return x

    def _add_head(self) -> None:
        head = self.config.head
        if head is not None and head.kind != "embedding":
            name = "qa_outputs" if head.kind == "span" else "score"
            has_bias = head.kind != "sequence"
            self.add_module(name, Linear(self.config.hidden_size, len(head.labels), bias=has_bias))

    def scores(self, hidden: Tensor) -> Tensor:
        """What the head makes of final hidden states: [..., E] → float32 [..., labels].

        An embedding model's are the states themselves. A classifier's count at a text's last token.

        Raises:
            ConfigError: the model has an output layer over the vocabulary instead.
        """
        head = self.config.head
        if head is None:
            raise ConfigError("the model has no head; it has logits")
        if head.kind != "embedding":
            hidden = self.get_submodule("qa_outputs" if head.kind == "span" else "score")(hidden)
        return hidden.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] → float32 [..., V]. A bfloat16 model's are rounded to bfloat16 before.

        Raises:
            ConfigError: the model has a head in place of an output layer.
        """
        if self.config.head is not None:
            raise ConfigError(
                f"the model has a head ({self.config.head.kind}) in place of an output layer: it "
                "gives scores, not text"
            )
        output = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = F.linear(hidden, output.weight).float()
        cap = self.config.logits_softcap
        return logits if cap is None else soft_cap(logits, cap)

    def forward(
        self, token_ids: Tensor, attend: Attend | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Whole rows, token_ids [B, T] → float32 logits [B, T, V].

        `positions`, [B, T], are given where a row holds several texts, and `attend` keeps those
        apart; else every row is one text from position 0 on.
        """
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        attend = attend or CausalAttention(self.config)
        return self.logits(self.hidden(token_ids, positions, attend))
