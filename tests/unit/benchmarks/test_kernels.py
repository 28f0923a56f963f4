"""Floors of the native runner's operations: their arithmetic, and that all of them are measured."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from llmserve.benchmarks.kernels import (
    KernelsOptions,
    bench_kernels,
    kernels_options,
    kernels_result,
)
from llmserve.benchmarks.kernels_floors import (
    Family,
    Need,
    Rates,
    attention_need,
    linear_need,
    prepare_need,
    sampling_need,
)
from llmserve.benchmarks.kernels_matrices import (
    Matrix,
    Pool,
    cache_size,
    folder_matrices,
    shape_matrices,
)
from llmserve.benchmarks.kernels_operations import Operation, operations_of
from llmserve.benchmarks.kernels_steps import Machine
from llmserve.benchmarks.shapes import SHAPES, make_model
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.native.kernels import available_paths, load_kernels
from llmserve.native.program import WeightKind
from llmserve.native.weights import Form, WeightSegment
from support.quantized_folders import write_quantized
from support.variants import GPT2, OLMO2, QWEN2_MOE, random_tensors

RATES = Rates(read_bytes=100.0, int4_dots=1000.0, int8_dots=500.0, floats=200.0)
NEEDS_KERNELS = pytest.mark.skipif(not available_paths(), reason="the kernels are not built here")


def tiny() -> ModelConfig:
    return replace(
        SHAPES["S"], vocab_size=400, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=16, intermediate_size=96,
    )  # fmt: skip


def matrix(name: str, scheme: str) -> Matrix:
    (found,) = (one for one in shape_matrices(tiny(), scheme) if one.name == name)
    return found


def test_floor_is_the_longer_of_reading_and_arithmetic() -> None:
    need = Need(read_bytes=300, operations=1000, family=Family.INT4_DOT)
    assert need.floor_s(RATES) == 3.0
    assert need.bound(RATES) == "memory"
    need = replace(need, family=Family.FLOAT32)
    assert need.floor_s(RATES) == 5.0
    assert need.bound(RATES) == "float32"
    assert replace(need, family=Family.INT8_DOT).bound(RATES) == "memory"  # 2 s


def test_best_rates_are_taken_one_by_one() -> None:
    other = Rates(read_bytes=50.0, int4_dots=2000.0, int8_dots=400.0, floats=300.0)
    assert RATES.best_with(other) == Rates(
        read_bytes=100.0, int4_dots=2000.0, int8_dots=500.0, floats=300.0
    )


@pytest.mark.parametrize(
    ("scheme", "num_bytes", "family"),
    [
        # 128 outputs of 64 inputs in two groups, each with a bfloat16 scale
        ("int4", 128 * 64 // 2 + 128 * 2 * 2, Family.INT4_DOT),
        # one scale for a whole row
        ("int8", 128 * 64 + 128 * 2, Family.INT8_DOT),
        ("bf16", 128 * 64 * 2, Family.FLOAT32),
    ],
)
def test_linear_layer_reads_its_weight_once(scheme: str, num_bytes: int, family: Family) -> None:
    linear = Pool(1 << 16).copies(matrix("qkv", scheme).spec)[0]
    assert linear.out == 128
    for num_rows in (1, 512):
        need = linear_need(linear, num_rows)
        digits = 2 if scheme == "int8" else 1
        operations = num_rows * 128 * 64 * digits
        assert need == Need(read_bytes=num_bytes, operations=operations, family=family)


def test_padding_is_read_but_is_no_work() -> None:
    spec = replace(matrix("qkv", "int4").spec, rows=(120,), width=40)
    need = linear_need(Pool(1 << 16).copies(spec)[0], 1)
    # blocks of 16 outputs, groups of 32 inputs
    assert need.read_bytes == 128 * 64 // 2 + 2 * 128 * 2
    assert need.operations == 120 * 40


def test_integer_weights_with_float_rows_are_multiplied_as_floats() -> None:
    spec = replace(matrix("down", "int4").spec, has_float_rows=True)
    linear = Pool(1 << 16).copies(spec)[0]
    assert linear_need(linear, 3).family is Family.FLOAT32


@pytest.mark.parametrize(("num_queries", "context_len"), [(1, 192), (5, 5), (3, 10)])
def test_attention_counts_each_pair_of_query_and_key(num_queries: int, context_len: int) -> None:
    config = tiny()
    need = attention_need(config, 128, num_seqs=2, num_queries=num_queries, context_len=context_len)
    mask = np.tri(context_len, dtype=np.int64)[context_len - num_queries :]
    assert need.operations == 2 * 2 * int(mask.sum()) * config.num_heads * config.head_dim
    assert need.read_bytes == 2 * context_len * 128
    assert need.family is Family.FLOAT32


def test_preparing_counts_norm_and_rounding_where_they_are_else_a_copy() -> None:
    int8 = Pool(1 << 16).copies(matrix("qkv", "int8").spec)[0]
    floats = Pool(1 << 16).copies(matrix("qkv", "bf16").spec)[0]
    counts = [
        prepare_need(linear, 10, has_norm=has_norm).operations // (10 * 64)
        for linear in (int8, floats)
        for has_norm in (True, False)
    ]
    assert counts == [4, 2, 2, 1]


def test_logits_are_read_from_memory_when_they_exceed_the_cache() -> None:
    small = sampling_need(1000, 2, is_greedy=True, cache_bytes=8000)
    assert small == Need(read_bytes=0, operations=2000, family=Family.FLOAT32)
    large = sampling_need(1000, 2, is_greedy=True, cache_bytes=7999)
    assert large.read_bytes == 8000
    drawn = sampling_need(1000, 2, is_greedy=False, cache_bytes=8000)
    assert drawn.operations > small.operations


def test_copies_do_not_share_memory() -> None:
    pool = Pool(100_000)
    spec = matrix("qkv", "int4").spec
    copies = pool.copies(spec)
    assert len(copies) == 100_000 // Pool.room_of(spec)
    assert pool.memory.ctypes.data % 64 == 0
    arrays = [array for one in copies for array in (one.values, one.scales) if array is not None]
    assert sum(array.nbytes for array in arrays) == sum(one.nbytes for one in copies)
    starts = [array.ctypes.data for array in arrays]
    ends = [array.ctypes.data + array.nbytes for array in arrays]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert ends[-1] <= pool.memory.ctypes.data + len(pool.memory)


def test_pool_holds_finite_numbers_of_every_kind() -> None:
    memory = Pool(70_000).memory
    assert np.isfinite(memory[: len(memory) // 4 * 4].view(np.float32)).all()
    bfloat16 = memory.view(np.uint16).astype(np.uint32) << 16
    assert np.isfinite(bfloat16.view(np.float32)).all()
    assert len(np.unique(memory)) > 100


@pytest.mark.parametrize(("scheme", "size"), [("int4", 32), ("int8", None), ("bf16", None)])
def test_shape_has_the_matrices_of_its_folder(
    scheme: Any, size: int | None, tmp_path: Path
) -> None:
    config = tiny()
    folder = tmp_path / "model"
    make_model(config, folder)
    if scheme != "bf16":
        folder = tmp_path / scheme
        write_quantized(tmp_path / "model", folder, scheme, size)
    segment = WeightSegment(Checkpoint.open(folder), Form(floats="bfloat16"))
    found = folder_matrices(config, segment)
    wanted = shape_matrices(config, scheme)
    assert [replace(one, spec=replace(one.spec, names=())) for one in found] == [
        replace(one, spec=replace(one.spec, names=())) for one in wanted
    ]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2, ["qkv*", "output", "up*", "down", "head"]),
        (OLMO2, ["qkv", "output", "gate+up", "down", "head"]),
        (
            QWEN2_MOE,
            [
                "qkv*",
                "output",
                "router*",
                "expert's gate+up*",
                "expert's down",
                "shared gate+up*",
                "shared down",
                "head",
            ],
        ),
    ],
    ids=["gpt2", "olmo2", "qwen2_moe"],
)
def test_matrices_follow_the_model(config: ModelConfig, names: list[str], tmp_path: Path) -> None:
    save_model(tmp_path / "model", config, random_tensors(config))
    segment = WeightSegment(Checkpoint.open(tmp_path / "model"), Form(floats="float32"))
    found = folder_matrices(config, segment)
    assert [one.name + "*" * one.has_norm for one in found] == names  # *: normalized before
    assert all(matrix.spec.kind is WeightKind.FLOAT32 for matrix in found)


@pytest.mark.native
@NEEDS_KERNELS
def test_a_timing_ends_however_large_the_memory_is() -> None:
    operations = operations_of(
        Machine(available_paths()[0], 1), tiny(), shape_matrices(tiny(), "int8"), Pool(64 << 20),
        num_rows=(1, 4096, 1 << 20), cache_dtype="int8",
    )  # fmt: skip
    all_copies, some, least = (one.copies for one in operations if one.name == "qkv")
    assert all_copies == len(Pool(64 << 20).copies(matrix("qkv", "int8").spec))
    assert least == 8 < some < all_copies
    for one in operations:
        if one.copies > 8:
            assert one.copies * one.need.operations <= 2e10


@pytest.mark.native
@NEEDS_KERNELS
def test_mixtures_and_models_without_gates_are_timed(tmp_path: Path) -> None:
    for name, config in (("gpt2", GPT2), ("olmo2", OLMO2), ("moe", QWEN2_MOE)):
        save_model(tmp_path / name, config, random_tensors(config))
        options = KernelsOptions(model=tmp_path / name, rows=(3,), repeats=1, pool_bytes=1 << 20)
        assert bench_kernels(options) == 0


def test_result_takes_ratios_within_a_repeat() -> None:
    operation = Operation(
        name="qkv", num_rows=8, copies=3, time_s=lambda: 0.0,
        need=Need(read_bytes=100, operations=1, family=Family.FLOAT32),
    )  # fmt: skip
    rates = [RATES, replace(RATES, read_bytes=50.0), replace(RATES, read_bytes=25.0)]
    times = [[2.0, 4.0, 10.0]]  # over floors of 1, 2 and 4 seconds
    (line,) = list_of(kernels_result(KernelsOptions(shape="S"), [operation], rates, times))
    assert line["time_over_floor"] == 2.0
    assert line["time_us"] == 4e6
    assert line["floor_us"] == 2e6
    assert line["bound"] == "memory"


@pytest.mark.native
@NEEDS_KERNELS
def test_machine_has_rates_on_every_path() -> None:
    kernels: Any = load_kernels()
    memory = np.zeros(1 << 20, np.uint8)
    for path in available_paths():
        assert min(kernels.measure_machine(path, 2, memory)) > 0
    with pytest.raises(ValueError, match="no threads or no memory"):
        kernels.measure_machine(available_paths()[0], 0, memory)


@pytest.mark.native
@NEEDS_KERNELS
def test_every_operation_is_in_table_and_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tiny(), tmp_path / "model")
    options = KernelsOptions(model=tmp_path / "model", rows=(1, 8), repeats=1, pool_bytes=1 << 20)
    assert bench_kernels(options) == 0
    *table, last = capsys.readouterr().out.splitlines()
    lines = list_of(orjson.loads(last))
    assert [(line["operation"], line["rows"]) for line in lines] == [
        *((name, n) for name in ("qkv", "output", "gate+up", "down", "head") for n in (1, 8)),
        *(("attention, context 192", n) for n in (1, 8, 32)),
        ("attention, prompt of 512", 512),
        *((name, n) for name in ("prepare for qkv", "prepare for down") for n in (1, 8)),
        *(("sampling, greedy", n) for n in (1, 8, 32)),
        *(("sampling, temperature 1", n) for n in (1, 8, 32)),
    ]
    assert [row.split("  ")[0] for row in table[2:]] == [line["operation"] for line in lines]


def test_arguments_become_options() -> None:
    given = argparse.Namespace(
        model=None, shape="M", scheme=None, rows="32,1", repeats=2, threads=3,
        instruction_set="avx2", kv_cache_dtype="int8",
    )  # fmt: skip
    assert kernels_options(given) == KernelsOptions(
        shape="M", scheme="int4", rows=(1, 32), repeats=2, threads=3, instruction_set="avx2",
        cache_dtype="int8",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="whole numbers"):
        kernels_options(argparse.Namespace(**{**vars(given), "rows": "few"}))
    with pytest.raises(ConfigError, match="--scheme is for --shape"):
        kernels_options(
            argparse.Namespace(
                **{**vars(given), "shape": None, "model": Path("m"), "scheme": "int8"}
            )
        )
    with pytest.raises(ConfigError, match="not both"):
        KernelsOptions(shape="M", model=Path("m"))
    with pytest.raises(ConfigError, match="at least 1"):
        KernelsOptions(shape="M", rows=(0,))


def test_cache_has_a_size() -> None:
    assert cache_size() >= 1 << 15


def list_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = result["operations"]
    return lines
