"""Folders of transformers open here and ours there, with equal logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.model.plain import generate_plain
from llmserve.model.weights import load_model
from support.theirs import THEIRS, make_theirs
from support.variants import VARIANTS, random_tensors

# transformers leaves its JSON files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

TOLERANCE = 1e-4  # float32 logits of size 1 to 10, summed in another order


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    yield module
    module.logging.set_verbosity_warning()
    module.logging.enable_progress_bar()


def random_ids(tokens: int = 60) -> torch.Tensor:
    return torch.randint(67, (2, tokens), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def compare(ours: Any, theirs: Any, tokens: int = 60) -> None:
    ids = random_ids(tokens)
    expected = theirs(ids).logits
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", THEIRS)
def test_their_folder_gives_equal_logits_here(transformers: Any, tmp_path: Path, name: str) -> None:
    theirs = make_theirs(transformers, name)
    theirs.save_pretrained(tmp_path)
    compare(load_model(Checkpoint.open(tmp_path)), theirs)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "phi3-partial", "mixtral"])
def test_their_shards_open_here(transformers: Any, tmp_path: Path, name: str) -> None:
    theirs = make_theirs(transformers, name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    compare(load_model(Checkpoint.open(tmp_path)), theirs)


def test_configuration_of_version_4_gives_equal_logits(transformers: Any, tmp_path: Path) -> None:
    theirs = make_theirs(transformers, "llama-llama3")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    values["torch_dtype"] = values.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(values))
    compare(load_model(Checkpoint.open(tmp_path)), theirs)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("own")])
def test_our_folder_gives_equal_logits_there(transformers: Any, tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    save_model(tmp_path / "m", config, random_tensors(config, scale=0.2))
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    ours = load_model(Checkpoint.open(tmp_path / "m"))
    compare(ours, theirs.eval(), tokens=config.max_seq_len)
    generated = generate_plain(ours, [3, 1, 4], 20)
    prompt = torch.tensor([[3, 1, 4]])
    ids = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ids[0, 3:].tolist() == generated


@pytest.mark.parametrize("name", ["qwen3-windows", "phi3-partial", "gemma3-linear", "mixtral"])
def test_their_folder_saved_again_is_theirs(transformers: Any, tmp_path: Path, name: str) -> None:
    make_theirs(transformers, name).save_pretrained(tmp_path / "theirs")
    source = Checkpoint.open(tmp_path / "theirs")
    tensors = {tensor: source.stored(tensor) for tensor in source.names()}
    save_model(tmp_path / "ours", source.config, tensors)
    again = Checkpoint.open(tmp_path / "ours")
    assert again.config == source.config
    for folder in ("theirs", "ours"):
        values = json.loads((tmp_path / folder / "config.json").read_text())
        assert values["architectures"] == [type(make_theirs(transformers, name)).__name__]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    compare(load_model(source), theirs)


@pytest.mark.parametrize("name", ["llama-llama3", "phi3", "gemma3_text", "qwen3-biases-windows"])
@pytest.mark.parametrize("old", [False, True], ids=["version-5", "version-4"])
def test_either_spelling_in_our_configuration_is_enough_there(
    transformers: Any, tmp_path: Path, old: bool, name: str
) -> None:
    """Version 4 reads one spelling of rope and type, version 5 the other: both must say it all."""
    config = VARIANTS[name]
    save_model(tmp_path / "m", config, random_tensors(config, scale=0.2))
    values = json.loads((tmp_path / "m/config.json").read_text())
    version_4 = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
    for key in {"rope_parameters", "dtype"} if old else version_4 | {"torch_dtype"}:
        values.pop(key, None)
    (tmp_path / "m/config.json").write_text(json.dumps(values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    compare(load_model(Checkpoint.open(tmp_path / "m", verify=False)), theirs, tokens=48)


def test_special_ids_arrive_there(transformers: Any, tmp_path: Path) -> None:
    config = VARIANTS["llama"]
    save_model(tmp_path / "m", config, random_tensors(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for settings in (theirs.config, theirs.generation_config):
        assert settings.bos_token_id == 1
        assert settings.eos_token_id == [2, 5]
        assert settings.pad_token_id == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types_arrive_there(transformers: Any, tmp_path: Path, dtype: Any) -> None:
    config = dataclasses.replace(VARIANTS["llama-untied"], dtype=dtype)
    save_model(tmp_path / "m", config, random_tensors(config, scale=0.2))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert theirs.dtype == getattr(torch, dtype)
    ours = load_model(Checkpoint.open(tmp_path / "m"), dtype=torch.float32)
    compare(ours, theirs.float(), tokens=48)
