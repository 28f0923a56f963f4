"""The hand-built graph on ONNX Runtime, against the torch model, for every variant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import Head, ModelConfig
from llmserve.failpoints import FailpointError
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_model
from support.variants import GPT2, LLAMA, VARIANTS, random_tensors

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llmserve.errors import CheckpointError, ConfigError, ExportError
from llmserve.export.onnx_attention import cache_head_dim
from llmserve.export.onnx_check import TOLERANCE, check_parity
from llmserve.export.onnx_decoder import build_decoder, cache_names
from llmserve.export.onnx_files import DATA_FILE, check_files, write_graph
from llmserve.export.onnx_head_check import check_head
from llmserve.export.onnx_session import OnnxDecoder
from llmserve.model_files import GRAPH_FILE
from llmserve.runners.onnx_session import open_session

pytestmark = pytest.mark.onnx

Exported = tuple[Transformer, OnnxDecoder, Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Exported]:
    """Write a random model of a configuration as a graph; each only once."""
    done: dict[ModelConfig, Exported] = {}

    def run(config: ModelConfig) -> Exported:
        if config not in done:
            folder = tmp_path_factory.mktemp("onnx")
            # Smaller weights than elsewhere: Gemma's norms make logits of hundreds of them.
            save_model(folder / "model", config, random_tensors(config, scale=0.25))
            source = Checkpoint.open(folder / "model")
            write_graph(build_decoder(config, source.float32), folder)
            decoder = OnnxDecoder(folder, max_len=config.max_seq_len, num_threads=1)
            done[config] = (load_model(source), decoder, folder)
        return done[config]

    return run


@torch.inference_mode()
def torch_logits(model: Transformer, ids: list[int]) -> np.ndarray:
    """Logits [length, vocabulary] of a whole row, without a cache."""
    return model(torch.tensor([ids]))[0].numpy()


def random_ids(config: ModelConfig, length: int, *, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "own-mixed-experts")
"""Beginnings of the variants' names."""


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith(WITH_EXPERTS)])
def test_every_variant_generates_what_torch_does(
    export: Callable[[ModelConfig], Exported], name: str
) -> None:
    config = VARIANTS[name]
    model, decoder, folder = export(config)
    check_files(folder)
    found = check_parity(model, decoder, config)
    assert (found.num_steps, found.num_prompts) == (32, 12)
    assert found.max_logit_error <= TOLERANCE
    assert found.top1_agreement == 1.0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_models_that_the_graph_has_no_part_for_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="experts"):
        build_decoder(VARIANTS[name], lambda _: np.empty(0, np.float32))


@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "head",
    [
        Head(kind="sequence", labels=("bad", "fair", "good")),
        Head(kind="token", labels=("name", "other")),
        Head(kind="span", labels=("start", "end")),
        Head(kind="embedding"),
    ],
    ids=lambda head: head.kind,
)
def test_every_head_gives_what_torch_does(tmp_path: Path, head: Head, base: ModelConfig) -> None:
    config = dataclasses.replace(base, head=head)
    save_model(tmp_path / "model", config, random_tensors(config))
    source = Checkpoint.open(tmp_path / "model")
    write_graph(build_decoder(config, source.float32), tmp_path)
    check_files(tmp_path)
    assert check_head(load_model(source), tmp_path, config) <= TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_chunked_prefill_gives_the_same_logits(
    export: Callable[[ModelConfig], Exported], config: ModelConfig
) -> None:
    """Several tokens over a past that is not empty: the causal mask must be shifted by it."""
    model, decoder, _ = export(config)
    ids = random_ids(config, 11)
    wanted = torch_logits(model, ids)
    found = [decoder.prefill([ids[:1]]), *(decoder.extend(np.array([ids[a:b]]))
                                           for a, b in ((1, 7), (7, 11)))]  # fmt: skip
    for logits, end in zip(found, (1, 7, 11), strict=True):
        np.testing.assert_allclose(logits[0], wanted[end - 1], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "mistral", "gpt2", "own-none"])
def test_cache_may_grow_from_call_to_call(
    export: Callable[[ModelConfig], Exported], name: str
) -> None:
    """As other programs run it: every present is the next call's past, and nothing is shared."""
    config = VARIANTS[name]
    model, _, folder = export(config)
    session = open_session(folder / GRAPH_FILE)
    ids = random_ids(config, 11)
    wanted = torch_logits(model, ids)
    empty = np.zeros((1, config.num_kv_heads, 0, cache_head_dim(config)), np.float32)
    past = {past: empty for index in range(config.num_layers) for past in cache_names(index)[:2]}
    done = 0
    for size in (5, 1, 4, 1):
        end = done + size
        feed = {
            "input_ids": np.array([ids[done:end]], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(done, end)[None],
        }
        known = {value.name for value in session.get_inputs()}
        given = {key: value for key, value in feed.items() if key in known}
        logits, *present = session.run(None, given | past)
        past = dict(zip(past, present, strict=True))
        np.testing.assert_allclose(logits[0], wanted[done:end], atol=TOLERANCE)
        done = end


def test_row_of_a_ragged_batch_equals_the_row_alone(
    export: Callable[[ModelConfig], Exported],
) -> None:
    _, decoder, _ = export(LLAMA)
    prompts = [random_ids(LLAMA, length, seed=length) for length in (1, 9, 4)]
    steps = [[3, 1, 4], [1, 5, 9], [2, 6, 5]]
    together = [decoder.prefill(prompts), *(decoder.decode(tokens) for tokens in steps)]
    for row, prompt in enumerate(prompts):
        alone = [decoder.prefill([prompt]), *(decoder.decode([tokens[row]]) for tokens in steps)]
        for batch, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(batch[row], single[0], atol=1e-5)
            assert np.isfinite(batch).all()


def test_large_weights_go_into_a_file_of_their_own(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, limit in ((inside, None), (outside, 1000)):
        folder.mkdir()
        write_graph(build_decoder(LLAMA, tensors.__getitem__), folder, external_above=limit)
        check_files(folder)
    assert [path.name for path in inside.iterdir()] == [GRAPH_FILE]
    assert {path.name for path in outside.iterdir()} == {GRAPH_FILE, DATA_FILE}
    assert (outside / DATA_FILE).stat().st_size % 4096 == 0
    assert (outside / GRAPH_FILE).stat().st_size < (inside / GRAPH_FILE).stat().st_size
    logits = [
        OnnxDecoder(folder, max_len=48).prefill([random_ids(LLAMA, 5)])
        for folder in (inside, outside)
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("limit", [None, 1000])
def test_same_model_gives_the_same_bytes(tmp_path: Path, limit: int | None) -> None:
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        graph = build_decoder(LLAMA, random_tensors(LLAMA).__getitem__)
        write_graph(graph, tmp_path / name, external_above=limit)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    untied = dataclasses.replace(LLAMA, tie_word_embeddings=False)
    graphs = [
        build_decoder(config, random_tensors(config).__getitem__) for config in (LLAMA, untied)
    ]
    sizes = [sum(values.nbytes for values in graph.weights.values()) for graph in graphs]
    assert sizes[1] - sizes[0] == 4 * LLAMA.vocab_size * LLAMA.hidden_size


def test_failpoint_before_writing(tmp_path: Path) -> None:
    failpoints.arm("onnx.write=raise")
    try:
        with pytest.raises(FailpointError):
            write_graph(build_decoder(LLAMA, random_tensors(LLAMA).__getitem__), tmp_path)
    finally:
        failpoints.disarm_all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_weight_that_is_off_is_noticed(tmp_path: Path, name: str) -> None:
    tensors = random_tensors(LLAMA)
    save_model(tmp_path / "model", LLAMA, tensors)
    model = load_model(Checkpoint.open(tmp_path / "model"))
    tensors[name] = tensors[name] * np.float32(1.001)
    write_graph(build_decoder(LLAMA, tensors.__getitem__), tmp_path)
    with pytest.raises(ExportError, match="a logit is off by"):
        check_parity(model, OnnxDecoder(tmp_path, max_len=48), LLAMA)


def test_logits_that_are_not_numbers_are_noticed(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    save_model(tmp_path / "model", LLAMA, tensors)
    model = load_model(Checkpoint.open(tmp_path / "model"))
    tensors["model.norm.weight"][0] = np.nan
    write_graph(build_decoder(LLAMA, tensors.__getitem__), tmp_path)
    with pytest.raises(ExportError, match="off by nan"):
        check_parity(model, OnnxDecoder(tmp_path, max_len=48), LLAMA)


def test_context_shorter_than_the_check_is_respected(
    export: Callable[[ModelConfig], Exported],
) -> None:
    config = dataclasses.replace(LLAMA, positions="learned", max_seq_len=10)
    model, decoder, _ = export(config)
    assert check_parity(model, decoder, config).num_steps == 5


def test_graph_that_onnx_runtime_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / GRAPH_FILE).write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="ONNX Runtime refuses the graph"):
        OnnxDecoder(tmp_path, max_len=48)
