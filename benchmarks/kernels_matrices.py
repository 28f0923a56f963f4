"""The matrices that `bench kernels` multiplies with: a model's sizes and forms, invented numbers.

What a product costs follows from the sizes alone. So all weights, scales and cached keys are cut
from one piece of memory, which is longer than the cache: copy after copy of a matrix lies behind
the one before, and each is out of the cache again when its turn comes, as in a model whose weights
exceed the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import ModelConfig
from llmserve.layouts import block_norms
from llmserve.native.matrices import BlockMatrices, MlpMatrices, specify_block
from llmserve.native.matrix_specs import MatrixSpec
from llmserve.native.program import Epilogue, Number, PackedLinear, WeightKind
from llmserve.native.weights import WeightSegment

__all__ = [
    "Matrix",
    "Pool",
    "cache_size",
    "folder_matrices",
    "shape_matrices",
]

_GROUP_SIZE = 32
_ALIGNMENT = 64
_ASSUMED_CACHE = 32 << 20
_CACHE_FILES = Path("/sys/devices/system/cpu/cpu0/cache")
_ACTIVATIONS = {
    "swiglu": Epilogue.SWIGLU,
    "geglu_tanh": Epilogue.GEGLU_TANH,
    "gelu": Epilogue.GELU,
    "gelu_tanh": Epilogue.GELU_TANH,
}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One kind of linear layer of a model."""

    name: str
    spec: MatrixSpec
    has_norm: bool = False
    """Whether its input is normalized."""
    epilogue: Epilogue = Epilogue.STORE
    """What becomes of its result."""
    cap: float = 0.0
    """Of the results, by tanh; 0: none."""


class Pool:
    """Memory that holds numbers of any kind: bfloat16 ones near 0, which are float32 ones by twos,
    and, read as integers, any."""

    def __init__(self, num_bytes: int) -> None:
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        start = -int(raw.__array_interface__["data"][0]) % _ALIGNMENT
        self.memory: npt.NDArray[np.uint8] = raw[start : start + size]
        drawn = np.random.default_rng(0).normal(0.0, 0.02, 1 << 15).astype(np.float32)
        pattern = (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        for at in range(0, size, len(pattern)):
            self.memory[at : at + len(pattern)] = pattern[: size - at]

    @staticmethod
    def room_of(spec: MatrixSpec) -> int:
        """Bytes that one copy of a matrix takes."""
        return _aligned(spec.value_bytes) + _aligned(spec.scale_bytes)

    def copies(self, spec: MatrixSpec) -> list[PackedLinear]:
        """As many copies of a matrix as there is room for: at least one, or it is a defect."""
        size = self.room_of(spec)
        assert size <= len(self.memory), "a matrix that is larger than the memory"
        places = range(0, len(self.memory) - size + 1, size)
        return [self._linear(spec, at, at + _aligned(spec.value_bytes)) for at in places]

    def _linear(self, spec: MatrixSpec, values: int, scales: int) -> PackedLinear:
        return PackedLinear(
            kind=spec.kind,
            out=spec.out,
            width=spec.width,
            group_size=spec.group_size,
            padded_group=spec.padded_group,
            num_groups=spec.num_groups,
            values=self.memory[values : values + spec.value_bytes],
            scales=self.memory[scales : scales + spec.scale_bytes] if spec.is_integer else None,
            scale_kind=spec.scale_kind,
            has_float_rows=spec.has_float_rows and spec.is_integer,
        )


def cache_size() -> int:
    """Bytes of the largest cache of a core; 32 MiB where the system does not say."""
    sizes = [_bytes_of(file.read_text().strip()) for file in _CACHE_FILES.glob("index*/size")]
    return max(sizes, default=_ASSUMED_CACHE)


def folder_matrices(config: ModelConfig, segment: WeightSegment) -> list[Matrix]:
    """The kinds of matrices of an opened model folder: those of its first block, or the first with
    experts, of which one stands for all; and the head.
    """
    with_experts = filter(config.has_experts, range(config.num_layers))
    block = specify_block(config, segment, next(with_experts, 0), has_adapters=False)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return [
        *_attention(config, block),
        *_feed_forward(config, block),
        _head(config, segment.specify_head(f"{head}.weight")),
    ]


def shape_matrices(config: ModelConfig, scheme: str) -> list[Matrix]:
    """Those that `folder_matrices` finds in a gated model's folder: `bf16`, or after `llmserve
    quantize` to `int4` or `int8`."""
    qkv = (config.q_size, config.kv_size, config.kv_size)
    inner = config.intermediate_size
    head = _spec((config.vocab_size,), config.hidden_size, scheme)
    if scheme != "bf16":
        head = _int8_head(head)
    return [
        Matrix(name="qkv", spec=_spec(qkv, config.hidden_size, scheme), has_norm=True),
        Matrix(
            name="output",
            spec=_spec((config.hidden_size,), config.q_size, scheme),
            epilogue=Epilogue.ADD,
        ),
        _joined(config, _spec((inner, inner), config.hidden_size, scheme, is_gated=True), ""),
        Matrix(
            name="down", spec=_spec((config.hidden_size,), inner, scheme), epilogue=Epilogue.ADD
        ),
        _head(config, head),
    ]


def _attention(config: ModelConfig, block: BlockMatrices) -> list[Matrix]:
    has_norm = block_norms(config).before_attention is not None
    names = ("qkv",) if len(block.qkv) == 1 else ("query", "key", "value")
    return [
        *(
            Matrix(name=name, spec=spec, has_norm=has_norm)
            for name, spec in zip(names, block.qkv, strict=True)
        ),
        Matrix(name="output", spec=block.output, epilogue=Epilogue.ADD),
    ]


def _feed_forward(config: ModelConfig, block: BlockMatrices) -> list[Matrix]:
    mlp = block.mlp
    if isinstance(mlp, MlpMatrices):
        return _mlp(config, mlp, "")
    router = Matrix(name="router", spec=mlp.router, has_norm=_has_mlp_norm(config))
    shared = [] if mlp.shared is None else _mlp(config, mlp.shared, "shared ")
    return [router, *_mlp(config, mlp.experts[0], "expert's "), *shared]


def _mlp(config: ModelConfig, mlp: MlpMatrices, prefix: str) -> list[Matrix]:
    down = Matrix(name=f"{prefix}down", spec=mlp.down, epilogue=Epilogue.ADD)
    if len(mlp.up) == 1:
        return [_joined(config, mlp.up[0], prefix), down]
    gate, up = (
        Matrix(name=prefix + name, spec=spec, has_norm=_has_mlp_norm(config))
        for name, spec in zip(("gate", "up"), mlp.up, strict=True)
    )
    return [gate, up, down]


def _joined(config: ModelConfig, spec: MatrixSpec, prefix: str) -> Matrix:
    """A feed-forward's first matrix, whose product goes through the activation."""
    return Matrix(
        name=prefix + ("gate+up" if config.is_gated else "up"),
        spec=spec,
        has_norm=_has_mlp_norm(config),
        epilogue=_ACTIVATIONS[config.activation],
    )


def _has_mlp_norm(config: ModelConfig) -> bool:
    return block_norms(config).before_mlp is not None


def _head(config: ModelConfig, spec: MatrixSpec) -> Matrix:
    return Matrix(name="head", spec=spec, cap=config.logits_softcap or 0.0)


def _spec(rows: tuple[int, ...], width: int, scheme: str, *, is_gated: bool = False) -> MatrixSpec:
    group = min(_GROUP_SIZE, width)
    forms: dict[str, dict[str, Any]] = {
        "int4": {"kind": WeightKind.INT4, "group_size": group},
        "int8": {"kind": WeightKind.INT8, "group_size": width},
        "bf16": {"kind": WeightKind.BFLOAT16, "group_size": width},
    }
    is_float = scheme == "bf16"
    return MatrixSpec(
        names=tuple(f"matrix {index}" for index in range(len(rows))),
        rows=rows,
        width=width,
        is_gated=is_gated,
        scale_kind=Number.FLOAT32 if is_float else Number.BFLOAT16,
        has_float_rows=False,
        **forms[scheme],
    )


def _int8_head(spec: MatrixSpec) -> MatrixSpec:
    """The head as the native runner makes it at load in a quantized folder."""
    return replace(
        spec,
        kind=WeightKind.INT8,
        group_size=spec.width,
        scale_kind=Number.FLOAT32,
        is_made_here=True,
    )


def _bytes_of(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
