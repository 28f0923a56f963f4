"""Several ranks against one process, over the same folder; the ranks are threads of this one."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve.adapters import load_adapter, save_adapter
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import Head, ModelConfig
from llmserve.engine.engine import Engine
from llmserve.engine.request import RequestOutput
from llmserve.errors import CheckpointError, ConfigError, EngineError
from llmserve.quant.dtypes import StoredArray
from llmserve.runners import rank_processes, torch_parallel_runner, torch_runner
from llmserve.runners.protocol import HeadRows, HiddenSum
from llmserve.runners.rank_checkpoint import RankCheckpoint
from llmserve.runners.rank_messages import Load, Loaded, Meet, encode, receive_command
from llmserve.runners.tensor_parallel import Rank
from llmserve.runners.torch_collectives import Collectives
from llmserve.runners.torch_parallel_runner import ParallelRunner
from llmserve.runners.torch_rank import serve_rank
from llmserve.runners.torch_runner import TorchRunner
from support.adapters import random_adapter
from support.batches import Share, make_batch, make_row
from support.engines import make_config, make_request, run
from support.quantized_folders import write_quantized
from support.ranks import Serve, in_threads
from support.variants import LLAMA, QWEN2, VARIANTS, random_tensors

PROMPTS = [[(7 * n + 3 * j) % 60 for j in range(n)] for n in (1, 9, 10, 19)]
CPU = torch.device("cpu")
ROUNDING = 2e-5
"""Sums of float32 in another order, over two layers, at logits around 1."""


def saved(folder: Path, config: ModelConfig) -> Checkpoint:
    save_model(folder, config, random_tensors(config))
    return Checkpoint.open(folder)


@contextlib.contextmanager
def parallel(
    checkpoint: Checkpoint, num_ranks: int = 2, *, serve: Serve = serve_rank, **settings: object
) -> Iterator[ParallelRunner]:
    runner = ParallelRunner(
        checkpoint, num_ranks=num_ranks, threads=1, start=in_threads(serve), **settings  # type: ignore[arg-type]
    )  # fmt: skip
    with contextlib.closing(runner):
        yield runner


def answers(runner: TorchRunner, **request: object) -> dict[str, list[RequestOutput]]:
    """Outputs by request, of prompts in chunks beside decodes, with preemptions on the way."""
    num_blocks = (17,) * len(runner.info.cache_groups)
    engine = Engine(
        runner, make_config(num_blocks=num_blocks, max_seq_len=48, max_batched_tokens=14)
    )
    for index, prompt in enumerate(PROMPTS):
        given = {"max_tokens": 10, "logprobs": 2, "prompt_logprobs": 1, **request}
        engine.add_request(make_request(str(index), prompt, ignore_eos=True, **given))
    outputs: dict[str, list[RequestOutput]] = {}
    for output in run(engine):
        outputs.setdefault(output.request_id, []).append(output)
    has_all = runner.info.cache_groups[0].window is None  # blocks that no window gives back
    assert (engine.stats().num_preemptions > 0) == has_all
    return outputs


def assert_alike(
    found: dict[str, list[RequestOutput]], wanted: dict[str, list[RequestOutput]]
) -> None:
    for request_id, outputs in wanted.items():
        ids = [token for output in outputs for token in output.token_ids]
        assert [token for one in found[request_id] for token in one.token_ids] == ids
        for kind in ("logprobs", "prompt_logprobs"):
            ours = [each.logprob for one in found[request_id] for each in getattr(one, kind)]
            theirs = [each.logprob for one in outputs for each in getattr(one, kind)]
            assert len(theirs) > 0 or kind == "prompt_logprobs"
            np.testing.assert_allclose(ours, theirs, atol=ROUNDING)


@pytest.mark.parametrize(
    ("variant", "num_ranks"),
    [
        ("llama", 2),
        ("llama", 4),  # more ranks than key heads
        ("llama-untied", 2),
        ("llama-biases", 4),
        ("gpt2", 2),
        ("qwen3", 2),
        ("olmo2", 4),  # a norm over all heads, of which two ranks have the same
        ("gemma3_text", 2),
        ("mixtral", 2),
        ("qwen2_moe", 4),
    ],
)
def test_tokens_and_logprobs_are_those_of_one_process(
    tmp_path: Path, variant: str, num_ranks: int
) -> None:
    checkpoint = saved(tmp_path / "model", VARIANTS[variant])
    wanted = answers(TorchRunner(checkpoint))
    with parallel(checkpoint, num_ranks) as runner:
        assert_alike(answers(runner), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_those_of_one_process(tmp_path: Path, dtype: str) -> None:
    checkpoint = saved(tmp_path / "model", LLAMA)
    batch = make_batch(
        [Share(token_ids=PROMPTS[3], tables=[[0, 2]]), Share(token_ids=[3], tables=[[1]])],
        block_size=16,
    )
    logits = []
    with parallel(checkpoint, dtype=dtype) as together:
        for runner in (TorchRunner(checkpoint, dtype=dtype), together):
            runner.allocate_cache((3,), 16)
            runner.submit(batch)
            logits.append(runner.logits(range(batch.num_tokens)))
    assert logits[1].shape == (20, 67)
    tolerance = {"float32": ROUNDING, "float16": 0.02, "bfloat16": 0.15}[dtype]
    np.testing.assert_allclose(logits[1], logits[0], atol=tolerance)


def test_several_choices_share_blocks_and_copy_them(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model", LLAMA)
    changes = {"n": 3, "temperature": 1.0, "seed": 4, "prompt_logprobs": None}
    wanted = answers(TorchRunner(checkpoint), **changes)
    with parallel(checkpoint) as runner:
        found = answers(runner, **changes)
    for request_id, outputs in wanted.items():
        by_choice = lambda ones: sorted((o.choice_index, o.token_ids) for o in ones)  # noqa: E731
        assert by_choice(found[request_id]) == by_choice(outputs)


def test_experts_are_chosen_by_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that rounded a router's logits otherwise would add up parts of different experts."""
    checkpoint = saved(tmp_path / "model", VARIANTS["qwen2_moe"])
    wanted = answers(TorchRunner(checkpoint))
    stored = RankCheckpoint.stored

    def otherwise(self: RankCheckpoint, name: str) -> StoredArray:
        array = stored(self, name)
        if self._rank.index and name.endswith(".mlp.gate.weight"):
            return StoredArray(array.dtype, -array.data)
        return array

    monkeypatch.setattr(RankCheckpoint, "stored", otherwise)
    with parallel(checkpoint) as runner:
        assert_alike(answers(runner), wanted)


def test_adapters_are_dealt_out_too(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model", QWEN2)
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), random_adapter(QWEN2, seed=seed))
    adapters = [load_adapter(f"a{seed}", tmp_path / str(seed)) for seed in (1, 2)]
    one = TorchRunner(checkpoint, adapters=adapters)
    plain = answers(one)
    with parallel(checkpoint, adapters=adapters) as runner:
        assert runner.info.fingerprint == one.info.fingerprint
        assert runner.info.adapters == ("a1", "a2")
        for name in ("a1", "a2"):
            wanted = answers(one, adapter=name)
            assert_alike(answers(runner, adapter=name), wanted)
            assert wanted["3"][-1].logprobs != plain["3"][-1].logprobs
        assert_alike(answers(runner), plain)


def test_an_adapter_that_other_ranks_could_not_read_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model", LLAMA)
    with pytest.raises(ConfigError, match="was not read from a folder"):
        ParallelRunner(checkpoint, num_ranks=2, threads=1, adapters=[random_adapter(LLAMA)])


@pytest.mark.parametrize("kind", ["sequence", "token", "span", "embedding"])
def test_models_with_heads_score_as_one_process_does(tmp_path: Path, kind: str) -> None:
    labels = {"span": ("start", "end"), "embedding": ()}.get(kind, ("x", "y", "z"))
    config = dataclasses.replace(LLAMA, head=Head(kind=kind, labels=labels))  # type: ignore[arg-type]
    checkpoint = saved(tmp_path / "model", config)
    batch = make_batch(
        [Share(token_ids=PROMPTS[2], tables=[[0]])],
        block_size=16,
        hidden_sums=[HiddenSum(start=2, stop=9, carry=None)],
    )
    batch.head_rows = [HeadRows(start=0, stop=10)]
    results = []
    with parallel(checkpoint) as together:
        for runner in (TorchRunner(checkpoint), together):
            runner.allocate_cache((1,), 16)
            runner.submit(batch)
            results.append(runner.collect())
        assert together.info.labels == labels
    np.testing.assert_allclose(results[1].head_scores[0], results[0].head_scores[0], atol=ROUNDING)
    np.testing.assert_allclose(
        results[1].hidden_sums[0], results[0].hidden_sums[0], atol=10 * ROUNDING
    )


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_quantized_folders_are_dequantized(tmp_path: Path, scheme: str) -> None:
    checkpoint = quantized(tmp_path, scheme)
    one = TorchRunner(checkpoint)
    with parallel(checkpoint) as runner:
        assert runner.info.executed_form == f"{scheme} weights as float32 on 2 ranks"
        assert_alike(answers(runner), answers(one))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_integers_stay_where_a_device_has_kernels(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' place is taken by plain products: Triton's interpreter is for one thread."""
    pytest.importorskip("triton")
    import support.triton_interpreter  # noqa: F401 - before the kernels
    from llmserve.runners import torch_gpu_layers, torch_integer_layers

    checkpoint = quantized(tmp_path, scheme)
    one = TorchRunner(checkpoint)
    monkeypatch.setattr(torch_runner, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch_gpu_layers, "join_operations", lambda model: None)
    monkeypatch.setattr(torch_integer_layers, "integer_linear", plain_product)
    with parallel(checkpoint) as runner:
        assert runner.info.executed_form == f"{scheme} weights times float32 on 2 ranks"
        assert runner.info.num_parameters == one.info.num_parameters
        assert runner.info.weight_bytes < one.info.weight_bytes
        assert_alike(answers(runner), answers(one))


def quantized(folder: Path, scheme: str) -> Checkpoint:
    """In groups that two ranks can share: 10 of 40 inputs, 12 of 24."""
    save_model(folder / "model", QWEN2, random_tensors(QWEN2))
    write_quantized(folder / "model", folder / "quantized", scheme, 12)  # type: ignore[arg-type]
    return Checkpoint.open(folder / "quantized")


def plain_product(
    x: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, group_size: int, *,
    out: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:  # fmt: skip
    assert zeros is None
    assert order is None
    width = x.shape[1]
    if integers.dtype == torch.int32:
        nibbles = integers[:, :, None] >> torch.arange(0, 32, 4) & 15
        integers = nibbles.flatten(1)[:, :width] - 8
    weight = integers.float() * scales.repeat_interleave(group_size, dim=1)[:, :width]
    out.copy_(x @ weight.t() + (0.0 if bias is None else bias))


@pytest.mark.parametrize(("variant", "num_ranks"), [("llama-untied", 2), ("llama", 4)])
def test_info_tells_of_all_ranks_together(tmp_path: Path, variant: str, num_ranks: int) -> None:
    config = VARIANTS[variant]
    checkpoint = saved(tmp_path / "model", config)
    one = TorchRunner(checkpoint).info
    with parallel(checkpoint, num_ranks) as runner:
        found = runner.info
        own = runner._model
        runner.allocate_cache((4,), 16)
        assert runner._cache is not None
        cached = sum(one.nbytes for one in (*runner._cache.keys, *runner._cache.values))
        num_slots = len(runner._cache.keys[0])
    assert found == dataclasses.replace(
        one,
        executed_form=f"float32 on {num_ranks} ranks",
        weight_bytes=found.weight_bytes,
        cache_groups=found.cache_groups,
    )
    repeats = max(1, num_ranks // config.num_kv_heads)
    assert found.cache_bytes_per_token == repeats * one.cache_bytes_per_token
    assert num_ranks * cached == num_slots * found.cache_bytes_per_token
    own_bytes = sum(parameter.nbytes for parameter in own.parameters())
    assert found.weight_bytes == num_ranks * own_bytes, "ranks have equally much"
    assert one.weight_bytes < found.weight_bytes < (1.3 if num_ranks == 2 else 2) * one.weight_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_ranks": 3}, "num_heads of 4 cannot be dealt out to 3 ranks"),
        ({"num_ranks": 4, "device": "cuda"}, "as many CUDA devices from 0 on; this machine has 3"),
        ({"num_ranks": 2, "device": "cuda:2"}, "CUDA devices from 2 on; this machine has 3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(tmp_path / "model", LLAMA)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=message):
        ParallelRunner(checkpoint, threads=1, **settings)  # type: ignore[arg-type]


def serve_other_files(connection: socket.socket) -> int:
    """A rank that found other files in the folder."""
    receive_command(connection)
    connection.sendall(encode(Loaded("another fingerprint", 1)))
    return 0


def test_files_that_were_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model", LLAMA)
    with (
        pytest.raises(CheckpointError, match="were changed while its ranks loaded them"),
        parallel(checkpoint, serve=serve_other_files),
    ):
        pass


def test_a_rank_that_cannot_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path / "model", LLAMA)

    def serve(connection: socket.socket) -> int:
        (tmp_path / "model" / "config.json").unlink()
        return serve_rank(connection)

    with (
        pytest.raises(EngineError, match=r"rank 1 of the model could not load: .*config\.json"),
        parallel(checkpoint, serve=serve),
    ):
        pass


def join(connection: socket.socket) -> Collectives:
    """Be a rank as far as meeting the others."""
    load = receive_command(connection)
    assert isinstance(load, Load)
    fingerprint = Checkpoint.open(load.folder, verify=False).fingerprint
    connection.sendall(encode(Loaded(fingerprint, 0)))
    meet = receive_command(connection)
    assert isinstance(meet, Meet)
    rank = Rank(load.rank, load.count)
    return Collectives(rank, CPU, meeting=Path(meet.meeting), timeout_s=meet.timeout_s)


def serve_and_leave(connection: socket.socket) -> int:
    """A rank that is gone in the midst of the first step."""
    join(connection)
    receive_command(connection)  # the cache
    receive_command(connection)  # the step
    return 3


def serve_and_hang(connection: socket.socket) -> int:
    """A rank that does nothing any more, until it is left."""
    group = join(connection)
    with contextlib.suppress(EngineError):
        while True:
            receive_command(connection)
    del group
    return 4


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (serve_and_leave, "rank 1 ended: with exit status 3"),
        (serve_and_hang, "another rank of the model is gone or hangs: .*[Tt]imed out"),
    ],
    ids=["gone", "hangs"],
)
def test_a_lost_rank_makes_the_step_an_error_and_the_runner_useless(
    tmp_path: Path, serve: Serve, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_parallel_runner, "PEER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(rank_processes, "CAUSE_TIMEOUT_S", 0.2)
    batch = make_batch([Share(token_ids=[1, 2], tables=[[0]])], block_size=16)
    with parallel(saved(tmp_path / "model", LLAMA), serve=serve) as runner:
        runner.allocate_cache((1,), 16)
        started = time.monotonic()
        with pytest.raises(EngineError, match=f"ranks are lost, load it anew: {reason}"):
            runner.submit(batch)
        assert time.monotonic() - started < 5
        with pytest.raises(EngineError, match=f"ranks are lost, load it anew: {reason}"):
            runner.submit(batch)


def test_a_step_that_is_broken_off_here_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_parallel_runner, "PEER_TIMEOUT_S", 0.5)  # no thread can be killed
    batch = make_batch([Share(token_ids=[1, 2], tables=[[0]])], block_size=16)
    with parallel(saved(tmp_path / "model", LLAMA)) as runner:
        runner.allocate_cache((1,), 16)
        with monkeypatch.context() as patch:
            patch.setattr(runner._model, "hidden", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                runner.submit(batch)
        with pytest.raises(EngineError, match="a step was broken off by ZeroDivisionError"):
            runner.submit(batch)


def test_a_token_row_is_sampled_by_rank_0_alone(tmp_path: Path) -> None:
    """A step without rows has no logits; what follows is in step all the same."""
    checkpoint = saved(tmp_path / "model", LLAMA)
    first = Share(token_ids=[1, 2, 3], tables=[[0]])
    then = Share(token_ids=[4], first=3, tables=[[0]], rows=[make_row([1, 2, 3, 4])])
    drawn = []
    with parallel(checkpoint) as together:
        for runner in (TorchRunner(checkpoint), together):
            runner.allocate_cache((1,), 16)
            runner.submit(make_batch([first], block_size=16))
            assert len(runner.collect().token_ids) == 0
            runner.submit(make_batch([then], block_size=16))
            drawn.append(runner.collect().token_ids.tolist())
    assert drawn[0] == drawn[1]
