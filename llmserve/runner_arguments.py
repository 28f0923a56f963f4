"""The command line's options of the runners, for every verb that loads a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypedDict

from .native.kernels import INSTRUCTION_SETS

if TYPE_CHECKING:
    from .runners.native_options import NativeOptions

__all__ = [
    "RunnerSettings",
    "add_runner_arguments",
    "add_verify_argument",
    "native_options",
    "runner_settings",
]


class RunnerSettings(TypedDict, total=False):
    """How a model is computed, under the names that `LLM` and `load_runner` share."""

    runner: str
    dtype: str | None
    device: str
    threads: int | None
    deterministic: bool
    tensor_parallel_size: int
    native: NativeOptions | None
    enforce_eager: bool


def add_runner_arguments(group: argparse._ArgumentGroup) -> None:
    """How a model is computed."""
    group.add_argument(
        "--runner", default="auto", help="auto, native, torch or onnx (default: auto)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the arithmetic (default: the folder's)",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument("--threads", type=int, help="threads for one step (default: all cores)")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="torch runner: answers equal bit for bit whatever else is in the batch, slower (the "
        "native runner's always are)",
    )
    group.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="COUNT",
        help="torch runner: processes that compute one model together, on CUDA with a device each "
        "(default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="on CUDA: start a step's kernels one by one, in place of captured CUDA graphs",
    )
    _add_native_arguments(group)


def add_verify_argument(group: argparse._ArgumentGroup) -> None:
    """Whether the model folder is checked."""
    group.add_argument(
        "--no-verify", action="store_true", help="do not check the files against the manifest"
    )


def _add_native_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare them; they are errors beside another runner."""
    group.add_argument(
        "--activations", choices=("integer", "float32"),
        help="native runner: what integer weights are multiplied with (default: integer)",
    )  # fmt: skip
    group.add_argument(
        "--head-weights", choices=("auto", "int8", "int4", "float"), default="auto",
        help="native runner: the output layer, made integers at load or as stored (default: int8 "
        "in a quantized folder)",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype", choices=("auto", "float32", "bfloat16", "int8", "fp8"), default="auto",
        help="native and torch runner: type of keys and values (default: int8 where the folder "
        "asks for it, else native float32 for float32 models and bfloat16 for others, torch the "
        "type of the arithmetic; fp8: torch runner)",
    )  # fmt: skip
    group.add_argument(
        "--instruction-set", choices=INSTRUCTION_SETS, default="auto",
        help="native runner: which of the processor's to use (default: the best)",
    )  # fmt: skip


def native_options(args: argparse.Namespace) -> NativeOptions | None:
    """What was asked for; None: nothing."""
    from .runners.native_options import NativeOptions

    given = {
        "activations": args.activations,
        "head_weights": args.head_weights,
        "cache_dtype": args.kv_cache_dtype,
        "instruction_set": args.instruction_set,
    }
    asked = {name: value for name, value in given.items() if value not in (None, "auto")}
    return NativeOptions(**asked) if asked else None


def runner_settings(args: argparse.Namespace) -> RunnerSettings:
    """What `add_runner_arguments` found."""
    return RunnerSettings(
        runner=args.runner,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        deterministic=args.deterministic,
        tensor_parallel_size=args.tensor_parallel_size,
        native=native_options(args),
        enforce_eager=args.enforce_eager,
    )
