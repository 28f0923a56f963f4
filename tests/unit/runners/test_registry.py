"""Which runner a model gets, what may be asked of it, and what is said when it is another."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.quant.groups import quantize_rtn
from llmserve.runners import native_options
from llmserve.runners.native_options import NativeOptions, obstacle_to_native
from llmserve.runners.registry import device_of_replica, load_runner, survives_fork
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.engine_setup import loaded_engine
from support.models import make_model_folder
from support.variants import LLAMA, QWEN2_MOE, random_tensors

needs_kernels = [
    pytest.mark.native,
    pytest.mark.skipif(native_options.load_kernels() is None, reason="the kernels are not built"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("model") / "model", LLAMA)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("model") / "model", LLAMA, {"proj": 8})


def saved(folder: Path, config: ModelConfig, groups: dict[str, int] | None = None) -> Checkpoint:
    """A model with random weights; layers whose name has a key of `groups` in int4, the first key
    that fits giving the group's size."""
    tensors: dict[str, Any] = dict(random_tensors(config))
    for name, value in tensors.items():
        sizes = [size for part, size in (groups or {}).items() if part in name]
        if sizes and name.endswith("proj.weight"):
            tensors[name] = quantize_rtn(value, bits=4, group_size=sizes[0])
    save_model(folder, config, tensors)
    return Checkpoint.open(folder)


def thread_ids() -> set[str]:
    return set(os.listdir("/proc/self/task"))


class TestNative:
    pytestmark = needs_kernels

    def test_auto_takes_it_without_a_word(
        self, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        runner = load_runner("auto", checkpoint, block_size=48, deterministic=True)
        assert runner.info.runner == "native"
        assert not caplog.records

    @pytest.mark.parametrize(
        ("options", "form", "cache"),
        [
            (NativeOptions(), "int4 weights x int8 activations, int8 head", "float32"),
            (
                NativeOptions(activations="float32"),
                "int4 weights x float32 activations, int8 head",
                "float32",
            ),
            (
                NativeOptions(head_weights="int4", cache_dtype="int8"),
                "int4 weights x int8 activations, int4 head",
                "int8",
            ),
            (
                NativeOptions(head_weights="float", cache_dtype="bfloat16"),
                "int4 weights x int8 activations, float32 head",
                "bfloat16",
            ),
        ],
    )
    def test_its_options_decide_what_is_executed(
        self, quantized: Checkpoint, options: NativeOptions, form: str, cache: str
    ) -> None:
        options = dataclasses.replace(options, instruction_set="portable")
        info = load_runner("auto", quantized, native=options).info
        assert (info.executed_form, info.cache_dtype) == (f"{form} (portable)", cache)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"dtype": "float16"}, "not in float16"),
            ({"device": "cuda"}, "not on cuda"),
            ({"block_size": 24}, "a multiple of 16 tokens, not 24"),
            ({"tensor_parallel_size": 2}, "in one process, not in 2"),
        ],
    )
    def test_what_it_cannot_do_is_refused_where_it_was_named(
        self, checkpoint: Checkpoint, settings: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"native runner cannot run this model: .*{reason}"):
            load_runner("native", checkpoint, **settings)

    @pytest.mark.parametrize(
        ("groups", "is_obstacle"),
        [
            ({"experts": 4}, False),
            ({"layers.1.mlp.experts": 12, "experts": 4}, False),
            ({"layers.1.mlp.experts.2": 2, "experts": 4}, True),
            ({"gate_proj": 2, "experts": 4}, True),
        ],
        ids=["alike", "layers differ", "one differs", "gate and input differ"],
    )
    def test_experts_of_a_layer_must_be_quantized_alike(
        self, tmp_path: Path, groups: dict[str, int], is_obstacle: bool
    ) -> None:
        config = dataclasses.replace(QWEN2_MOE, hidden_size=24, num_heads=3, num_kv_heads=1)
        experts = saved(tmp_path / "model", config, groups)
        obstacle = obstacle_to_native(experts, dtype=None, device="cpu")
        if is_obstacle:
            assert obstacle is not None
            assert "quantized in different ways" in obstacle
        else:
            assert obstacle is None
            assert load_runner("native", experts).info.runner == "native"

    def test_it_may_be_forked_until_it_has_a_cache(self, checkpoint: Checkpoint) -> None:
        assert survives_fork("auto", checkpoint)
        assert not survives_fork("torch", checkpoint)
        assert not survives_fork("auto", checkpoint, block_size=8), "that is torch's to run"
        assert not survives_fork("auto", checkpoint, tensor_parallel_size=2), "so is that"
        before = thread_ids()
        runner = load_runner("native", checkpoint, threads=4)
        while not thread_ids() <= before:  # those that packed are about to be gone
            pass
        runner.allocate_cache((4,), 16)
        assert len(thread_ids() - before) == 3, "these would not follow a fork"
        runner.close()

    def test_blocks_that_it_does_not_have_go_to_torch_in_a_server_too(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        asked = EngineSettings(
            model=str(make_model_folder(tmp_path / "model")),
            runner="auto",
            block_size=8,
            max_batched_tokens=64,
            cache_bytes=1 << 20,
        )
        with loaded_engine(asked) as loaded:
            assert loaded.info.runner == "torch"
        assert "a multiple of 16 tokens, not 8" in caplog.text


def test_torch_takes_over_with_one_line(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_options, "load_kernels", lambda: None)
    with caplog.at_level(logging.INFO):
        assert load_runner("auto", checkpoint).info.runner == "torch"
    (record,) = caplog.records
    assert "its kernels are not built" in record.getMessage()


@pytest.mark.parametrize(
    "option",
    [{"activations": "integer"}, {"head_weights": "int8"}, {"instruction_set": "avx2"}],
    ids=str,
)
def test_torch_refuses_the_native_runners_options(
    checkpoint: Checkpoint, option: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="choices of the native runner"):
        load_runner("torch", checkpoint, native=NativeOptions(**option))
    with pytest.raises(ConfigError, match=r"torch runner, which runs this model \(it computes in"):
        load_runner("auto", checkpoint, dtype="float16", native=NativeOptions(**option))
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
        ({"tensor_parallel_size": -2}, "tensor_parallel_size must be at least 1, got -2"),
        ({"tensor_parallel_size": 2, "deterministic": True}, "deterministic mode computes in one"),
        ({"tensor_parallel_size": 3}, "num_heads of 4 cannot be dealt out to 3 ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    checkpoint: Checkpoint, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_runner("torch", checkpoint, **settings)


@pytest.mark.parametrize(
    ("num_parameters", "asked", "wanted"), [(1, None, 1), (10**9, None, 3), (10**9, 5, 5)]
)
def test_ranks_share_the_cores(
    checkpoint: Checkpoint, num_parameters: int, asked: int | None, wanted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A small model has one thread in each rank, a large one its share; what is asked counts."""
    from llmserve.runners import registry, torch_parallel_runner, torch_runner

    given: dict[str, Any] = {}

    def load(checkpoint: Checkpoint, **settings: Any) -> torch_runner.TorchRunner:
        given.update(settings)
        return torch_runner.TorchRunner(checkpoint)

    monkeypatch.setattr(torch_parallel_runner, "ParallelRunner", load)
    monkeypatch.setattr(registry, "num_parameters_of", lambda config: num_parameters)
    monkeypatch.setattr(torch_runner, "DEFAULT_THREADS", 6)
    threads: list[int] = []
    monkeypatch.setattr(torch_runner, "use_threads", threads.append)
    load_runner("torch", checkpoint, tensor_parallel_size=2, threads=asked)
    assert (given["threads"], threads) == (wanted, [wanted])
    assert given["num_ranks"] == 2


@pytest.mark.parametrize(
    ("device", "num_ranks", "expected"),
    [
        ("cuda", 1, ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:0"]),
        ("cuda", 2, ["cuda:0", "cuda:2", "cuda:0"]),  # the fifth stays idle
        ("cuda", 6, ["cuda", "cuda"]),  # what loads the model will say so
        ("cuda:3", 1, ["cuda:3", "cuda:3"]),
        ("cpu", 1, ["cpu", "cpu"]),
    ],
)
def test_replicas_have_devices_of_their_own(
    monkeypatch: pytest.MonkeyPatch, device: str, num_ranks: int, expected: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    found = [device_of_replica(device, n, num_ranks=num_ranks) for n in range(len(expected))]
    assert found == expected
