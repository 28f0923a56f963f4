"""A model's program from its configuration and checkpoint: what C++ does in a step, in order.

Every variant of `ModelConfig` but mixtures of experts is a choice of operations here; the C++ knows
no families. Names of tensors are canonical (`layouts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..layouts import BlockNorms, block_norms
from .positions import sinusoid_rows
from .program import Epilogue, Norm, Number, PackedLinear, Program, WeightKind
from .weights import Form, MatrixSpec, WeightSegment, number_of

__all__ = ["NativeModel", "describe"]

_PLAIN_ACTIVATIONS = {"gelu": Epilogue.GELU, "gelu_tanh": Epilogue.GELU_TANH}
_GATED_ACTIVATIONS = {"swiglu": Epilogue.SWIGLU, "geglu_tanh": Epilogue.GEGLU_TANH}


@dataclass(frozen=True, slots=True, eq=False)
class NativeModel:
    """A program with its weights, ready to be run."""

    program: Program
    hidden: int
    """Buffer of the residual stream after the last block."""
    final_hidden: int
    """Buffer of the rows asked for, normalized."""
    logits: int
    """Buffer of the logits."""
    weight_bytes: int
    """Bytes of the matrices as executed."""
    forms: tuple[str, ...]
    """How the matrices are executed, head last, for people."""


@dataclass(slots=True)
class _Layer:
    """The matrices of one block."""

    name: str
    qkv: list[MatrixSpec]
    output: MatrixSpec
    up: list[MatrixSpec]
    down: MatrixSpec


def describe(
    checkpoint: Checkpoint, form: Form, *, layer_groups: list[int], threads: int
) -> NativeModel:
    """Pack the weights and write the program down.

    Args:
        checkpoint: An open model folder, of a language model.
        form: How matrices are executed.
        layer_groups: Cache group of each layer.
        threads: Matrices packed at a time.

    Raises:
        CheckpointError: weights that cannot be used.
    """
    config = checkpoint.config
    segment = WeightSegment(checkpoint, form)
    layers = [_specify_layer(config, segment, index) for index in range(config.num_layers)]
    head_name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    head = segment.specify_head(f"{head_name}.weight")
    segment.pack(threads)
    writer = _Writer(checkpoint, segment, layer_groups)
    return writer.write(layers, head)


def _specify_layer(config: ModelConfig, segment: WeightSegment, index: int) -> _Layer:
    name = f"model.layers.{index}"
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    qkv = segment.specify([f"{attention}.{part}_proj.weight" for part in "qkv"])
    (output,) = segment.specify([f"{attention}.o_proj.weight"])
    if config.is_gated:
        up = segment.specify(
            [f"{mlp}.{part}_proj.weight" for part in ("gate", "up")], is_gated=True
        )
    else:
        up = segment.specify([f"{mlp}.up_proj.weight"])
    (down,) = segment.specify([f"{mlp}.down_proj.weight"])
    return _Layer(name, qkv, output, up, down)


class _Writer:
    """Writes one model's program."""

    def __init__(
        self, checkpoint: Checkpoint, segment: WeightSegment, layer_groups: list[int]
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config = checkpoint.config
        self._segment = segment
        window_of = {group: config.window_of(layer) for layer, group in enumerate(layer_groups)}
        self._program = program = Program(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer_groups=layer_groups,
            windows=[window_of[group] or 0 for group in sorted(window_of)],
        )
        self._norms: BlockNorms = block_norms(config)
        width = config.hidden_size
        self._x = program.buffer(width)
        self._qkv = program.buffer(config.q_size + 2 * config.kv_size)
        self._attended = program.buffer(config.q_size)
        # Of a half block before the norm behind it; gate and input where they are not computed
        # together.
        self._branch = program.buffer(width)
        self._inner = program.buffer(config.intermediate_size)
        self._gate = program.buffer(config.intermediate_size)
        self._up = program.buffer(config.intermediate_size)

    def write(self, layers: list[_Layer], head: MatrixSpec) -> NativeModel:
        program, config = self._program, self._config
        self._embed()
        for index, layer in enumerate(layers):
            self._attention(layer, index)
            self._feed_forward(layer)
        rows = program.buffer(config.hidden_size, on_rows=True)
        logits = program.buffer(config.vocab_size, on_rows=True)
        program.gather(self._x, rows)
        packed = self._segment.packed(head)
        program.norm(rows, config.hidden_size, self._norm("model.norm"))
        slot = program.prepare(rows, config.hidden_size, None, packed, on_rows=True)
        program.linear(
            slot, packed, Epilogue.STORE, logits, cap=config.logits_softcap or 0.0, on_rows=True
        )
        program.sample(logits, config.vocab_size)
        return NativeModel(
            program=program,
            hidden=self._x,
            final_hidden=rows,
            logits=logits,
            weight_bytes=self._segment.nbytes,
            forms=_forms([*layers], packed, self._segment),
        )

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

    def _attention(self, layer: _Layer, index: int) -> None:
        program, config = self._program, self._config
        norm = self._block_norm(layer, self._norms.before_attention)
        column = 0
        for spec in layer.qkv:
            packed = self._segment.packed(spec)
            slot = program.prepare(self._x, config.hidden_size, norm, packed)
            program.linear(slot, packed, Epilogue.STORE, self._qkv, column=column)
            column += spec.out
        query_norm, key_norm = self._query_key_norms(layer)
        program.rope(
            self._qkv,
            index,
            rotary_dim=config.rotary_size if config.positions == "rope" else 0,
            table=int(config.has_local_rope(index)),
            query_norm=query_norm,
            key_norm=key_norm,
            is_whole_norm=config.qk_norm == "full",
        )
        program.attend(
            self._qkv, index, self._attended,
            scale=config.score_scale, cap=config.attention_softcap or 0.0,
        )  # fmt: skip
        self._add_branch(
            layer, self._attended, config.q_size, layer.output, self._norms.after_attention
        )

    def _feed_forward(self, layer: _Layer) -> None:
        program, config = self._program, self._config
        norm = self._block_norm(layer, self._norms.before_mlp)
        if len(layer.up) == 1:
            activation = _GATED_ACTIVATIONS if config.is_gated else _PLAIN_ACTIVATIONS
            packed = self._segment.packed(layer.up[0])
            slot = program.prepare(self._x, config.hidden_size, norm, packed)
            program.linear(slot, packed, activation[config.activation], self._inner)
        else:
            for spec, out in zip(layer.up, (self._gate, self._up), strict=True):
                packed = self._segment.packed(spec)
                slot = program.prepare(self._x, config.hidden_size, norm, packed)
                program.linear(slot, packed, Epilogue.STORE, out)
            program.gate(
                self._gate, self._up, self._inner, config.intermediate_size,
                _GATED_ACTIVATIONS[config.activation],
            )  # fmt: skip
        self._add_branch(
            layer, self._inner, config.intermediate_size, layer.down, self._norms.after_mlp
        )

    def _add_branch(
        self, layer: _Layer, source: int, width: int, spec: MatrixSpec, norm_name: str | None
    ) -> None:
        """The product that ends a half block, its norm if there is one, the residual."""
        packed = self._segment.packed(spec)
        slot = self._program.prepare(source, width, None, packed)
        if norm_name is None:
            self._program.linear(slot, packed, Epilogue.ADD, self._x)
            return
        self._program.linear(slot, packed, Epilogue.STORE, self._branch)
        norm = self._block_norm(layer, norm_name)
        assert norm is not None, "a norm that has a name"
        self._program.add_norm(self._branch, self._x, self._config.hidden_size, norm)

    def _block_norm(self, layer: _Layer, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{layer.name}.{name}")

    def _norm(self, name: str, *, is_rms: bool | None = None) -> Norm:
        config = self._config
        if is_rms is None:
            is_rms = config.norm == "rmsnorm"
        return self._segment.norm(
            name, eps=config.norm_eps, offset=config.norm_weight_offset, is_rms=is_rms
        )

    def _query_key_norms(self, layer: _Layer) -> tuple[Norm | None, Norm | None]:
        if self._config.qk_norm == "none":
            return None, None
        name = f"{layer.name}.self_attn"
        return (
            self._norm(f"{name}.q_norm", is_rms=True),
            self._norm(f"{name}.k_norm", is_rms=True),
        )


def _forms(layers: list[_Layer], head: PackedLinear, segment: WeightSegment) -> tuple[str, ...]:
    specs = {
        (packed.kind, packed.has_float_rows)
        for layer in layers
        for packed in map(segment.packed, [*layer.qkv, layer.output, *layer.up, layer.down])
    }
    names = [_form_name(kind, has_floats) for kind, has_floats in sorted(specs)]
    return (*names, f"{head.kind.name.lower()} head")


def _form_name(kind: int, has_float_rows: bool) -> str:
    weight = WeightKind(kind)
    is_integer = weight in (WeightKind.INT4, WeightKind.INT8)
    activations = "float32" if has_float_rows or not is_integer else "int8"
    return f"{weight.name.lower()} weights x {activations} activations"
