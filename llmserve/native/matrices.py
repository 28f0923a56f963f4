"""Which matrices a block has, as they are to be packed: attention's, and those of its feed-forward,
plain or of several experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import ModelConfig
from ..errors import CheckpointError
from .matrix_specs import MatrixSpec
from .weights import WeightSegment

__all__ = ["BlockMatrices", "ExpertMatrices", "MlpMatrices", "specify_block"]


@dataclass(frozen=True, slots=True)
class MlpMatrices:
    """A feed-forward: gate and input as one matrix, or two where they cannot be one; output."""

    up: list[MatrixSpec]
    down: MatrixSpec


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """A mixture: the router, the experts, the one for every token with its gate."""

    router: MatrixSpec
    experts: list[MlpMatrices]
    shared: MlpMatrices | None
    shared_gate: MatrixSpec | None


@dataclass(frozen=True, slots=True)
class BlockMatrices:
    """The matrices of one block."""

    index: int
    qkv: list[MatrixSpec]
    """One, or three where their forms differ."""
    output: MatrixSpec
    mlp: MlpMatrices | ExpertMatrices

    @property
    def name(self) -> str:
        """Canonical name of the block."""
        return f"model.layers.{self.index}"

    def all(self) -> list[MatrixSpec]:
        """Every matrix that is executed in the folder's form."""
        mlps = [self.mlp] if isinstance(self.mlp, MlpMatrices) else self.mlp.experts
        return [*self.qkv, self.output, *(spec for mlp in mlps for spec in (*mlp.up, mlp.down))]


def specify_block(
    config: ModelConfig, segment: WeightSegment, index: int, *, has_adapters: bool
) -> BlockMatrices:
    """The matrices of block `index`. With adapters gate and input stay apart.

    Raises:
        CheckpointError: experts of one layer that are quantized in different ways.
    """
    attention = f"model.layers.{index}.self_attn"
    qkv = segment.specify([f"{attention}.{part}_proj.weight" for part in "qkv"])
    (output,) = segment.specify([f"{attention}.o_proj.weight"])
    mlp = f"model.layers.{index}.mlp"
    if config.has_experts(index):
        return BlockMatrices(index, qkv, output, _experts(config, segment, mlp))
    is_joined = not has_adapters
    return BlockMatrices(index, qkv, output, _mlp(config, segment, mlp, is_joined=is_joined))


def _mlp(
    config: ModelConfig, segment: WeightSegment, name: str, *, is_joined: bool = True
) -> MlpMatrices:
    parts = ("gate", "up") if config.is_gated else ("up",)
    names = [f"{name}.{part}_proj.weight" for part in parts]
    if is_joined:
        up = segment.specify(names, is_gated=config.is_gated)
    else:
        up = [spec for one in names for spec in segment.specify([one])]
    (down,) = segment.specify([f"{name}.down_proj.weight"])
    return MlpMatrices(up, down)


def _experts(config: ModelConfig, segment: WeightSegment, name: str) -> ExpertMatrices:
    rules = config.experts
    assert rules is not None, "a layer with experts in a model without"
    (router,) = segment.specify([f"{name}.gate.weight"])
    experts = [_mlp(config, segment, f"{name}.experts.{i}") for i in range(rules.num_experts)]
    _check_alike(name, [one.up for one in experts])
    _check_alike(name, [[one.down] for one in experts])
    shared = gate = None
    if rules.shared_intermediate_size is not None:
        shared = _mlp(config, segment, f"{name}.shared_expert")
        (gate,) = segment.specify([f"{name}.shared_expert_gate.weight"])
    return ExpertMatrices(router, experts, shared, gate)


def _check_alike(name: str, experts: Sequence[Sequence[MatrixSpec]]) -> None:
    forms = {(len(specs), specs[0].kind, specs[0].group_size) for specs in experts}
    if len(forms) > 1 or len(experts[0]) > 1:
        raise CheckpointError(
            f"{name}: its experts, or their gate and input, are quantized in different ways; the "
            "native runner needs one form for all: use the torch runner"
        )
