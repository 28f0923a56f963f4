"""The command line's options of the native runner, for every verb that loads a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runners.native_options import NativeOptions

__all__ = ["add_native_arguments", "native_options"]


def add_native_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare them; they are errors beside another runner."""
    group.add_argument(
        "--activations", choices=("int8", "float32"), default="int8",
        help="native runner: what integer weights are multiplied with (default: int8)",
    )  # fmt: skip
    group.add_argument(
        "--head-weights", choices=("auto", "int8", "int4", "float"), default="auto",
        help="native runner: the output layer, made integers at load or as stored (default: int8 "
        "in a quantized folder)",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype", choices=("auto", "float32", "bfloat16", "int8"), default="auto",
        help="native runner: type of keys and values (default: float32 for float32 models, else "
        "bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--instruction-set", choices=("auto", "avx512", "avx2", "portable"), default="auto",
        help="native runner: which of the processor's to use (default: the best)",
    )  # fmt: skip


def native_options(args: argparse.Namespace) -> NativeOptions:
    """What was asked for."""
    from .runners.native_options import NativeOptions

    return NativeOptions(
        activations=args.activations,
        head_weights=args.head_weights,
        cache_dtype=args.kv_cache_dtype,
        instruction_set=args.instruction_set,
    )
