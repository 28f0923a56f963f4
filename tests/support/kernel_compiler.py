"""Compiles the kernels of every launch of the GPU path for GPUs that are not there.

A script, since Triton decides when it is imported whether kernels are interpreted. The product's
own functions launch, on tensors of a CPU; a driver that knows a GPU's capability and no GPU has
Triton compile what would run, from its language to machine code. Prints one line of JSON for each
kernel: its name and what a program takes, bytes of shared memory and, of each thread, bytes of what
did not fit into registers.

    python kernel_compiler.py 80    # the compute capability: 8.0
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import prod

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from llmserve.model.layers import Rotation
from llmserve.runners.torch_cache import LayerCache
from llmserve.runners.torch_triton_attention import TileReads, paged_attention
from llmserve.runners.torch_triton_elementwise import Norm, add_and_normalize, gate, normalize_rows
from llmserve.runners.torch_triton_heads import HeadNorms, keep_heads
from llmserve.runners.torch_triton_linear import code_linear, integer_linear

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
PROGRAMS: list[str] = []
"""Digests of what was launched."""


class AbsentGpu:
    """What Triton asks a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_only(kernel: JITFunction, grid: object) -> Callable[..., None]:
    """In place of `kernel[grid]`: compile for these arguments, and say what came out."""

    def launch(*args: object, **kwargs: object) -> None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        PROGRAMS.append(compiled.hash)
        found = {"kernel": kernel.__name__, "shared_bytes": compiled.metadata.shared}
        print(json.dumps({**found, "spilled_bytes": stack_bytes(compiled.asm["cubin"])}))

    return launch


def stack_bytes(binary: bytes) -> int:
    """Of a thread's local memory, from what NVIDIA's own program says of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of the stack: {said}")
    return int(found[1])


def pools(kv: int, width: int, dtype: torch.dtype, form: torch.dtype | None) -> LayerCache:
    """Three blocks of 16 slots."""
    stored = [torch.zeros(48, kv, width, dtype=form or dtype) for _ in range(2)]
    return LayerCache(*stored, *(torch.zeros(48, kv) for _ in range(0 if form is None else 2)))


def indices(size: int, *shape: int) -> Tensor:
    """A step's, at an address that is a multiple of 16, or for odd sizes of 8."""
    return torch.zeros(1 + prod(shape), dtype=torch.int64)[size % 2 :][: prod(shape)].view(shape)


def attend(
    heads: int, kv: int, width: int, dtype: torch.dtype, form: torch.dtype | None = None, *,
    window: int | None = None, cap: float | None = None, size: int = 1,
) -> None:  # fmt: skip
    """A prefill and decodes, of `size` sequences, blocks and spans."""
    reads = TileReads(
        block_tables=indices(size, size, size), block_size=16, window=window,
        prefill_tiles=indices(size, 1, 5), span_tiles=indices(size, size, 5),
        span_rows=indices(size, size, 2), max_spans=size,
    )  # fmt: skip
    q = torch.zeros(size, heads, width, dtype=dtype)
    paged_attention(q, pools(kv, width, dtype, form), reads, scale=0.1, cap=cap)


def keep(
    dtype: torch.dtype, form: torch.dtype | None = None, *, is_plain: bool = False, size: int = 1
) -> None:
    """Heads of `size` tokens."""
    q, k, v = torch.zeros(size, 48, 128, dtype=dtype).split([32, 8, 8], dim=1)
    layer, slots = pools(8, 128, dtype, form), indices(size, size)
    if is_plain:
        keep_heads(q, k, v, layer, slots)
        return
    table = torch.zeros(size, 1, 3, 64, dtype=dtype)
    norm = Norm(torch.zeros(128, dtype=dtype), 1e-6, 0.0)
    rotation = Rotation(table[..., :1, :], table[..., 1:, :])
    keep_heads(q, k, v, layer, slots, rotation, HeadNorms(norm, norm))


def multiply(
    dtype: torch.dtype, weights: torch.dtype, *, has_more: bool = False, size: int = 1
) -> None:
    """`size` decodes, then a prefill of 64 rows more."""
    width = 256
    for num_rows in (size, 64 + size):
        x, out = torch.zeros(num_rows, width, dtype=dtype), torch.zeros(num_rows, 64, dtype=dtype)
        if weights is torch.uint8:
            codes, scales = torch.zeros(64 * width // 2, dtype=weights), torch.zeros(256)
            code_linear(x, codes, scales, torch.zeros(16), out=out)
            continue
        integers = torch.zeros(64, width // (8 if weights is torch.int32 else 1), dtype=weights)
        scales, more = torch.zeros(64, 2, dtype=dtype), {}
        if has_more:
            more = {
                "zeros": torch.zeros(64, 2, dtype=torch.int8),
                "order": torch.zeros(width, dtype=torch.int32),
                "bias": torch.zeros(64, dtype=dtype),
            }
        integer_linear(x, integers, scales, 128, out=out, **more)


def elementwise(dtype: torch.dtype, *, size: int = 1) -> None:
    """Joints with every choice of norms, and gates."""
    x, norm = torch.zeros(size, 4096, dtype=dtype), Norm(torch.zeros(4096, dtype=dtype), 1e-6, 1.0)
    add_and_normalize(x, x, after=norm, before=norm)
    add_and_normalize(x, x, after=None, before=norm)
    normalize_rows(x, norm)
    gate(x, is_silu=True)
    gate(x, is_silu=False)


def in_any_step(launch: Callable[..., None], *args: object) -> None:
    """Launch in steps of several sizes, which must run the same programs.

    Else a server would compile, while requests wait, at each size that comes for the first time.
    """
    programs = []
    for size in (1, 3, 16):
        PROGRAMS.clear()
        launch(*args, size=size)
        programs.append(list(PROGRAMS))
    if programs[1:] != programs[:-1]:
        raise SystemExit(f"{launch.__name__}: a step of another size compiles other programs")


def launch_all() -> None:
    """Every kernel, in the forms that differ in what they ask of a GPU."""
    in_any_step(attend, 32, 8, 128, BF16)
    attend(8, 1, 256, BF16, torch.int8, window=100, cap=3.0)
    attend(12, 4, 96, F16, torch.uint8)
    attend(8, 1, 512, F32)
    in_any_step(keep, BF16)
    keep(F32, torch.int8)
    keep(BF16, torch.uint8, is_plain=True)
    in_any_step(multiply, BF16, torch.int32)
    multiply(F32, torch.int32, has_more=True)
    multiply(F16, torch.int8)
    multiply(BF16, torch.uint8)
    in_any_step(elementwise, BF16)


if __name__ == "__main__":
    JITFunction.__getitem__ = compile_only
    driver.set_active(AbsentGpu(int(sys.argv[1])))
    launch_all()
