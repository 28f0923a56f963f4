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

from llmserve.errors import ConfigError, ExportError
from llmserve.export.onnx_check import TOLERANCE, check_parity
from llmserve.export.onnx_decoder import build_decoder, cache_names
from llmserve.export.onnx_files import DATA_FILE, MODEL_FILE, check_files, write_graph
from llmserve.export.onnx_session import OnnxDecoder

pytestmark = pytest.mark.onnx

Exported = tuple[Transformer, OnnxDecoder, Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Exported]:
    """Write a random model of a configuration as a graph; each only once."""
    done: dict[ModelConfig, Exported] = {}

    def run(config: ModelConfig) -> Exported:
        if config not in done:
            folder = tmp_path_factory.mktemp("onnx")
            save_model(folder / "model", config, random_tensors(config))
            source = Checkpoint.open(folder / "model")
            write_graph(build_decoder(config, source.float32), folder)
            done[config] = (load_model(source), OnnxDecoder(folder, config), folder)
        return done[config]

    return run


@torch.inference_mode()
def torch_logits(model: Transformer, ids: list[int]) -> np.ndarray:
    """Logits [length, vocabulary] of a whole row, without a cache."""
    return model(torch.tensor([ids]))[0].numpy()


def random_ids(config: ModelConfig, length: int, *, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


REFUSED = {
    "qwen3": "qk_norm",
    "olmo2": "norm_placement",
    "phi3": "rotary_dim",
    "gemma2": "attention_softcap, logits_softcap",
    "gemma3_text": "local_rope_theta",
    "mixtral": "experts",
    "qwen2_moe": "experts",
    "qwen3_moe": "experts",
    "own-mixed-experts": "experts",
    "own-geglu-post": "activation",
}
"""Beginning of a variant's name → a setting that its refusal names."""


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith((*REFUSED,))])
def test_every_variant_generates_what_torch_does(
    export: Callable[[ModelConfig], Exported], name: str
) -> None:
    config = VARIANTS[name]
    model, decoder, folder = export(config)
    check_files(folder)
    found = check_parity(model, decoder, config)
    assert (found.num_steps, found.num_prompts) == (32, 4)
    assert found.max_logit_error <= TOLERANCE


@pytest.mark.parametrize(("name", "named"), REFUSED.items())
def test_models_that_the_graph_has_no_part_for_are_refused_by_name(name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_decoder(VARIANTS[name], lambda _: np.empty(0, np.float32))


def test_head_in_place_of_the_output_layer_is_refused_by_name() -> None:
    config = dataclasses.replace(LLAMA, head=Head(kind="embedding"))
    with pytest.raises(ConfigError, match="head"):
        build_decoder(config, lambda _: np.empty(0, np.float32))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_chunked_prefill_gives_the_same_logits(
    export: Callable[[ModelConfig], Exported], config: ModelConfig
) -> None:
    """Several tokens over a past that is not empty: the causal mask must be shifted by it."""
    model, decoder, _ = export(config)
    ids = random_ids(config, 11)
    wanted = torch_logits(model, ids)
    past = {
        name: np.zeros((1, config.num_kv_heads, 0, config.head_dim), np.float32)
        for index in range(config.num_layers)
        for name in cache_names(index)[:2]
    }
    done = 0
    for size in (1, 6, 4):
        chunk = np.array([ids[done : done + size]], np.int64)
        feed = {
            "input_ids": chunk,
            "attention_mask": np.ones((1, done + size), np.int64),
            "position_ids": np.arange(done, done + size)[None],
        }
        logits, *present = decoder._session.run(None, feed | past)
        past = dict(zip(past, present, strict=True))
        np.testing.assert_allclose(logits[0], wanted[done : done + size], atol=TOLERANCE)
        done += size


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
    assert [path.name for path in inside.iterdir()] == [MODEL_FILE]
    assert {path.name for path in outside.iterdir()} == {MODEL_FILE, DATA_FILE}
    assert (outside / DATA_FILE).stat().st_size % 4096 == 0
    assert (outside / MODEL_FILE).stat().st_size < (inside / MODEL_FILE).stat().st_size
    logits = [
        OnnxDecoder(folder, LLAMA).prefill([random_ids(LLAMA, 5)]) for folder in (inside, outside)
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
        check_parity(model, OnnxDecoder(tmp_path, LLAMA), LLAMA)


def test_logits_that_are_not_numbers_are_noticed(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    save_model(tmp_path / "model", LLAMA, tensors)
    model = load_model(Checkpoint.open(tmp_path / "model"))
    tensors["model.norm.weight"][0] = np.nan
    write_graph(build_decoder(LLAMA, tensors.__getitem__), tmp_path)
    with pytest.raises(ExportError, match="off by nan"):
        check_parity(model, OnnxDecoder(tmp_path, LLAMA), LLAMA)


def test_context_shorter_than_the_check_is_respected(
    export: Callable[[ModelConfig], Exported],
) -> None:
    config = dataclasses.replace(LLAMA, positions="learned", max_seq_len=10)
    model, decoder, _ = export(config)
    assert check_parity(model, decoder, config).num_steps == 5


def test_graph_that_onnx_runtime_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"no graph")
    with pytest.raises(ExportError, match="ONNX Runtime refuses the exported graph"):
        OnnxDecoder(tmp_path, LLAMA)


def test_graph_means_the_same_to_the_standards_own_evaluator(
    export: Callable[[ModelConfig], Exported],
) -> None:
    """Padding and all: by the standard, a token that attends to nothing would be NaN."""
    from onnx.reference import ReferenceEvaluator

    _, decoder, folder = export(LLAMA)
    prompts = [random_ids(LLAMA, length, seed=length) for length in (2, 6)]
    wanted = decoder.prefill(prompts)
    empty = np.zeros((2, LLAMA.num_kv_heads, 0, LLAMA.head_dim), np.float32)
    mask = np.array([[0, 0, 0, 0, 1, 1], [1] * 6])
    feed = {
        "input_ids": np.array([[0] * 4 + prompts[0], prompts[1]]),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    for index in range(LLAMA.num_layers):
        feed |= dict.fromkeys(cache_names(index)[:2], empty)
    logits, *present = ReferenceEvaluator(str(folder / MODEL_FILE)).run(None, feed)
    np.testing.assert_allclose(logits[:, -1], wanted, atol=TOLERANCE)
    assert all(np.isfinite(values).all() for values in [logits, *present])


def test_mask_shows_every_token_itself_and_the_tokens_before_it() -> None:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    graph = build_decoder(
        dataclasses.replace(LLAMA, positions="none"), random_tensors(LLAMA).__getitem__
    )
    wanted = next(index for index, node in enumerate(graph.nodes) if "mask" in node.output)
    mask_info = helper.make_tensor_value_info("mask", TensorProto.BOOL, None)
    weights = [helper.make_tensor(name, 7, values.shape, values.reshape(-1))
               for name, values in graph.weights.items() if values.dtype == np.int64]  # fmt: skip
    nodes = [node for node in graph.nodes[: wanted + 1] if node.op_type != "Gather"]
    part = helper.make_graph(nodes, "mask", graph.inputs[:2], [mask_info], weights)
    evaluator = ReferenceEvaluator(helper.make_model(part))

    tokens = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for past in (0, 2):
        ids = np.zeros((2, 5 - past), np.int64)
        (mask,) = evaluator.run(None, {"attention_mask": tokens, "input_ids": ids})
        queries, keys = np.arange(past, 5)[:, None], np.arange(5)
        expected = ((keys <= queries) & (tokens[:, None] == 1)) | (keys == queries)
        np.testing.assert_array_equal(mask, expected[:, None])
        assert mask.any(axis=-1).all(), "a padded token attends to nothing"
