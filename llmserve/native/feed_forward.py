"""The operations of a block's feed-forward: plain, gated, or of several experts."""

from __future__ import annotations

from functools import cached_property

from ..config import ModelConfig
from .lora import LoraMatrices
from .matrices import BlockMatrices, ExpertMatrices, MlpMatrices
from .program import Domain, Epilogue, Norm, Program
from .weights import WeightSegment

__all__ = ["FeedForwardWriter"]

_PLAIN = {"gelu": Epilogue.GELU, "gelu_tanh": Epilogue.GELU_TANH}
_GATED = {"swiglu": Epilogue.SWIGLU, "geglu_tanh": Epilogue.GEGLU_TANH}


class FeedForwardWriter:
    """Writes the feed-forwards of one model's program; its buffers serve all blocks."""

    def __init__(
        self, config: ModelConfig, program: Program, segment: WeightSegment, lora: LoraMatrices,
        x: int, branch: int,
    ) -> None:  # fmt: skip
        """`x` is the buffer of the residual stream, `branch` that of a half block's output."""
        self._config, self._program, self._segment, self._lora = config, program, segment, lora
        self._x, self._branch = x, branch
        experts = config.experts
        widths = [config.intermediate_size]
        if experts is not None and experts.shared_intermediate_size is not None:
            widths.append(experts.shared_intermediate_size)
        self._inner_width = max(widths)
        self._inner = program.buffer(self._inner_width)
        if experts is not None:
            self._router = program.buffer(experts.num_experts)
            self._share = program.buffer(1)
            self._shared = program.buffer(config.hidden_size)
            self._routed_x = program.buffer(config.hidden_size, Domain.ROUTED)
            self._routed_inner = program.buffer(experts.intermediate_size, Domain.ROUTED)
            self._routed_out = program.buffer(config.hidden_size, Domain.ROUTED)

    @cached_property
    def _gate(self) -> int:
        """Buffer of what goes through the activation, where that is not the product's own work."""
        return self._program.buffer(self._inner_width)

    @cached_property
    def _up(self) -> int:
        """Buffer of what it is multiplied with."""
        return self._program.buffer(self._inner_width)

    def write(self, block: BlockMatrices, norm: Norm | None, *, is_direct: bool) -> None:
        """The feed-forward of `norm(x)`: added to `x`, or (not `is_direct`) left in `branch`."""
        if isinstance(block.mlp, MlpMatrices):
            out = self._x if is_direct else self._branch
            epilogue = Epilogue.ADD if is_direct else Epilogue.STORE
            self._write_mlp(block.mlp, norm, out, epilogue, layer_index=block.index)
            return
        self._write_experts(block.mlp, norm)
        if is_direct:
            self._program.add(self._branch, self._x)

    def _write_mlp(
        self, mlp: MlpMatrices, norm: Norm | None, out: int, epilogue: Epilogue,
        *, layer_index: int | None,
    ) -> None:  # fmt: skip
        """`layer_index`: whose adapters there may be; None: none."""
        program, config = self._program, self._config
        lora = self._lora if layer_index is not None else None
        width = mlp.down.width
        if len(mlp.up) == 1 and not (lora and not config.is_gated):
            packed = self._segment.packed(mlp.up[0])
            slot = program.prepare(self._x, config.hidden_size, norm, packed)
            activation = _GATED if config.is_gated else _PLAIN
            program.linear(slot, packed, activation[config.activation], self._inner)
        else:
            self._write_apart(mlp, norm, layer_index)
        packed = self._segment.packed(mlp.down)
        slot = program.prepare(self._inner, width, None, packed, needs_values=bool(lora))
        program.linear(slot, packed, epilogue, out)
        if lora is not None and layer_index is not None:
            lora.write(program, slot, layer_index, "down_proj", out)

    def _write_apart(self, mlp: MlpMatrices, norm: Norm | None, layer_index: int | None) -> None:
        """The products before the activation stored, each with what its adapters add."""
        program, config = self._program, self._config
        names = ("gate_proj", "up_proj") if config.is_gated else ("up_proj",)
        outs = (self._gate, self._up) if config.is_gated else (self._gate,)
        for spec, name, out in zip(mlp.up, names, outs, strict=True):
            packed = self._segment.packed(spec)
            slot = program.prepare(
                self._x, config.hidden_size, norm, packed, needs_values=bool(self._lora)
            )
            program.linear(slot, packed, Epilogue.STORE, out)
            if layer_index is not None:
                self._lora.write(program, slot, layer_index, name, out)
        activation = {**_PLAIN, **_GATED}[config.activation]
        program.gate(self._gate, outs[-1], self._inner, activation)

    def _write_experts(self, mlp: ExpertMatrices, norm: Norm | None) -> None:
        program, config, packed = self._program, self._config, self._segment.packed
        rules, width = config.experts, config.hidden_size
        assert rules is not None, "experts in a model without"
        router = packed(mlp.router)
        slot = program.prepare(self._x, width, norm, router)
        program.linear(slot, router, Epilogue.STORE, self._router)
        program.route(self._router, rules.num_experts, is_normalized=rules.normalize_weights)
        program.dispatch(self._x, self._routed_x)
        ups = [packed(one.up[0]) for one in mlp.experts]
        slot = program.prepare(self._routed_x, width, norm, ups[0], Domain.ROUTED)
        activation = (_GATED if config.is_gated else _PLAIN)[config.activation]
        program.experts(slot, ups, activation, self._routed_inner)
        downs = [packed(one.down) for one in mlp.experts]
        slot = program.prepare(
            self._routed_inner, rules.intermediate_size, None, downs[0], Domain.ROUTED
        )
        program.experts(slot, downs, Epilogue.STORE, self._routed_out)
        program.combine(self._routed_out, self._branch)
        if mlp.shared is not None and mlp.shared_gate is not None:
            gate = packed(mlp.shared_gate)
            slot = program.prepare(self._x, width, norm, gate)
            program.linear(slot, gate, Epilogue.STORE, self._share)
            self._write_mlp(mlp.shared, norm, self._shared, Epilogue.STORE, layer_index=None)
            program.add_gated(self._shared, self._share, self._branch)
