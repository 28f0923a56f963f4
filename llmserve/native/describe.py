"""A model's program from its configuration and checkpoint: what C++ does in a step, in order.

Every variant of `ModelConfig` is a choice of operations here; the C++ knows no families. Names of
tensors are canonical (`layouts.py`). Feed-forwards are in `feed_forward.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters import Adapter
from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..layouts import BlockNorms, block_norms
from .feed_forward import FeedForwardWriter
from .lora import LoraMatrices
from .matrices import BlockMatrices, specify_block
from .matrix_specs import MatrixSpec
from .positions import sinusoid_rows
from .program import Domain, Epilogue, Norm, Number, PackedLinear, Program, WeightKind
from .stored_integers import number_of
from .weights import Form, WeightSegment

__all__ = ["NativeModel", "describe"]

_COLUMN_SLACK = 16
"""Floats that a product may write behind its last column."""


@dataclass(frozen=True, slots=True, eq=False)
class NativeModel:
    """A program with its weights, ready to be run."""

    program: Program
    final_hidden: int
    """Buffer of the rows asked for, normalized."""
    logits: int
    """Buffer of their logits or scores; an embedding model has none but the rows themselves."""
    weight_bytes: int
    """Bytes of the matrices as executed."""
    forms: tuple[str, ...]
    """How the matrices are executed, head last, for people."""


def describe(
    checkpoint: Checkpoint, form: Form, *, layer_groups: list[int], threads: int,
    adapters: Sequence[Adapter] = (),
) -> NativeModel:  # fmt: skip
    """Pack the weights and write the program down.

    Args:
        checkpoint: An open model folder, of a language model.
        form: How matrices are executed.
        layer_groups: Cache group of each layer.
        threads: Matrices packed at a time.
        adapters: LoRA adapters that requests may name.

    Raises:
        CheckpointError: weights that cannot be used, or an adapter that does not fit.
    """
    config = checkpoint.config
    lora = LoraMatrices(config, adapters)
    segment = WeightSegment(checkpoint, form)
    blocks = [
        specify_block(config, segment, index, has_adapters=bool(adapters))
        for index in range(config.num_layers)
    ]
    head = _specify_head(config, segment)
    segment.pack(threads)
    return _Writer(checkpoint, segment, lora, layer_groups).write(blocks, head)


def _specify_head(config: ModelConfig, segment: WeightSegment) -> MatrixSpec | None:
    """The output layer, or what scores hidden states in its place; None: nothing does."""
    head = config.head
    if head is None:
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return segment.specify_head(f"{name}.weight")
    if head.kind == "embedding":
        return None
    (scores,) = segment.specify(["qa_outputs.weight" if head.kind == "span" else "score.weight"])
    return scores


class _Writer:
    """Writes one model's program."""

    def __init__(
        self, checkpoint: Checkpoint, segment: WeightSegment, lora: LoraMatrices,
        layer_groups: list[int],
    ) -> None:  # fmt: skip
        self._checkpoint, self._segment, self._lora = checkpoint, segment, lora
        self._config = config = checkpoint.config
        window_of = {group: config.window_of(layer) for layer, group in enumerate(layer_groups)}
        self._program = program = Program(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer_groups=layer_groups,
            windows=[window_of[group] or 0 for group in sorted(window_of)],
            num_experts_per_token=config.experts.num_experts_per_token if config.experts else 0,
            num_adapters=len(lora.adapters),
        )
        self._norms: BlockNorms = block_norms(config)
        self._x = program.buffer(config.hidden_size)
        self._qkv = program.buffer(config.q_size + 2 * config.kv_size + _COLUMN_SLACK)
        self._attended = program.buffer(config.q_size)
        # What a half block made, where a norm or several experts stand before the residual.
        self._branch = program.buffer(config.hidden_size)
        self._mlp = FeedForwardWriter(config, program, segment, lora, self._x, self._branch)

    def write(self, blocks: list[BlockMatrices], head: MatrixSpec | None) -> NativeModel:
        """The whole program."""
        program, config = self._program, self._config
        self._embed()
        for block in blocks:
            self._attention(block)
            self._feed_forward(block)
        rows = program.buffer(config.hidden_size, Domain.ROWS)
        program.gather(self._x, rows)
        program.norm(rows, config.hidden_size, self._norm("model.norm"))
        packed = None if head is None else self._segment.packed(head)
        return NativeModel(
            program=program,
            final_hidden=rows,
            logits=rows if packed is None else self._head(rows, packed),
            weight_bytes=self._segment.nbytes,
            forms=_forms(blocks, packed, self._segment),
        )

    def _head(self, rows: int, packed: PackedLinear) -> int:
        """The buffer of logits, from which tokens are drawn, or of scores."""
        program, config = self._program, self._config
        out = program.buffer(packed.out, Domain.ROWS)
        slot = program.prepare(rows, config.hidden_size, None, packed, Domain.ROWS)
        cap = 0.0 if config.head is not None else config.logits_softcap or 0.0
        program.linear(slot, packed, Epilogue.STORE, out, Domain.ROWS, cap=cap)
        if config.head is None:
            program.sample(out, config.vocab_size)
        return out

    def _embed(self) -> None:
        config, checkpoint = self._config, self._checkpoint
        table = checkpoint.stored("model.embed_tokens.weight")
        positions, kind = None, Number.FLOAT32
        if config.positions == "learned":
            stored = checkpoint.stored("model.embed_positions.weight")
            positions, kind = np.ascontiguousarray(stored.data), number_of(stored)
        elif config.positions == "sinusoidal":
            positions = sinusoid_rows(config.max_seq_len, config.hidden_size)
        self._program.embed(
            self._x, np.ascontiguousarray(table.data), number_of(table), config.hidden_size,
            scale=config.embedding_scale, positions=positions, position_kind=kind,
        )  # fmt: skip

    def _attention(self, block: BlockMatrices) -> None:
        program, config = self._program, self._config
        self._query_key_value(block)
        query_norm, key_norm = self._query_key_norms(block)
        program.rope(
            self._qkv,
            block.index,
            rotary_dim=config.rotary_size if config.positions == "rope" else 0,
            table=int(config.has_local_rope(block.index)),
            query_norm=query_norm,
            key_norm=key_norm,
            is_whole_norm=config.qk_norm == "full",
        )
        program.attend(
            self._qkv, block.index, self._attended,
            scale=config.score_scale, cap=config.attention_softcap or 0.0,
        )  # fmt: skip
        packed = self._segment.packed(block.output)
        slot = program.prepare(
            self._attended, config.q_size, None, packed, needs_values=bool(self._lora)
        )
        norm = self._block_norm(block, self._norms.after_attention)
        out = self._x if norm is None else self._branch
        program.linear(slot, packed, Epilogue.ADD if norm is None else Epilogue.STORE, out)
        self._lora.write(program, slot, block.index, "o_proj", out)
        self._add_branch(norm)

    def _query_key_value(self, block: BlockMatrices) -> None:
        program, config = self._program, self._config
        norm = self._block_norm(block, self._norms.before_attention)
        column = slot = 0
        for spec in block.qkv:
            packed = self._segment.packed(spec)
            slot = program.prepare(
                self._x, config.hidden_size, norm, packed, needs_values=bool(self._lora)
            )
            program.linear(slot, packed, Epilogue.STORE, self._qkv, column=column)
            column += spec.out
        for place, part in ((0, "q"), (config.q_size, "k"), (config.q_size + config.kv_size, "v")):
            self._lora.write(program, slot, block.index, f"{part}_proj", self._qkv, column=place)

    def _feed_forward(self, block: BlockMatrices) -> None:
        before = self._block_norm(block, self._norms.before_mlp)
        after = self._block_norm(block, self._norms.after_mlp)
        self._mlp.write(block, before, is_direct=after is None)
        self._add_branch(after)

    def _add_branch(self, norm: Norm | None) -> None:
        """The residual takes a half block's output through its norm, if there is one."""
        if norm is not None:
            self._program.add_norm(self._branch, self._x, self._config.hidden_size, norm)

    def _block_norm(self, block: BlockMatrices, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{block.name}.{name}")

    def _norm(self, name: str, *, is_rms: bool | None = None) -> Norm:
        config = self._config
        if is_rms is None:
            is_rms = config.norm == "rmsnorm"
        return self._segment.norm(
            name, eps=config.norm_eps, offset=config.norm_weight_offset, is_rms=is_rms
        )

    def _query_key_norms(self, block: BlockMatrices) -> tuple[Norm | None, Norm | None]:
        if self._config.qk_norm == "none":
            return None, None
        name = f"{block.name}.self_attn"
        return self._norm(f"{name}.q_norm", is_rms=True), self._norm(f"{name}.k_norm", is_rms=True)


def _forms(
    blocks: list[BlockMatrices], head: PackedLinear | None, segment: WeightSegment
) -> tuple[str, ...]:
    specs = {
        (packed.kind, packed.has_float_rows)
        for block in blocks
        for packed in map(segment.packed, block.all())
    }
    names = [_form_name(kind, has_floats) for kind, has_floats in sorted(specs)]
    if head is None:
        return tuple(names)
    head_name = head.kind.name.lower()
    return tuple(names) if names == [head_name] else (*names, f"{head_name} head")


def _form_name(kind: WeightKind, has_float_rows: bool) -> str:
    name = kind.name.lower()
    if kind not in (WeightKind.INT4, WeightKind.INT8):
        return name
    integers = "int8" if kind is WeightKind.INT4 else "int16"
    return f"{name} weights x {'float32' if has_float_rows else integers} activations"
