"""The whole model: stepwise equals whole, training behaves, weights begin as stated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmserve.model.attention import CausalAttention, DenseCache
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_canonical
from support.variants import LLAMA, VARIANTS, random_tensors


def make_model(name: str, **changes: Any) -> Transformer:
    config = dataclasses.replace(VARIANTS[name], **changes)
    model = Transformer(config).eval()
    tensors = random_tensors(config, scale=0.15)
    load_canonical(model, {key: torch.from_numpy(value) for key, value in tensors.items()})
    return model


def random_ids(batch: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LLAMA.vocab_size, (batch, tokens), generator=generator)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_dense_cache_in_steps_equals_the_whole_forward(name: str) -> None:
    model = make_model(name)
    ids = random_ids(2, 14)
    whole = model(ids)
    cache = DenseCache(model.config, batch_size=2)
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 14)):
        hidden = model.hidden(ids[:, start:stop], torch.arange(start, stop), cache)
        pieces.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_packed_tokens_without_a_batch_axis_equal_rows() -> None:
    """The form that the paged runner uses: [T] ids and positions, its own attention."""
    model = make_model("llama")
    ids = random_ids(1, 7)

    def packed(layer_index: int, q: Any, k: Any, v: Any) -> torch.Tensor:
        assert q.shape == (7, 4, 6)
        assert k.shape == v.shape == (7, 2, 6)
        return CausalAttention(LLAMA)(layer_index, q[None], k[None], v[None])[0]

    hidden = model.hidden(ids[0], torch.arange(7), packed)
    torch.testing.assert_close(model.logits(hidden), model(ids)[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_later_token_changes_nothing_before_it() -> None:
    model = make_model("llama")
    first, second = random_ids(1, 10), random_ids(1, 10)
    second[0, 6] += 1
    a, b = model(first), model(second)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=0)
    assert (a[:, 6:] - b[:, 6:]).abs().amax() > 1e-3


@torch.inference_mode()
def test_a_token_changes_nothing_beyond_the_reach_of_all_windows() -> None:
    """Two layers of 5 carry a token 4 places on each: 8 after it, and no further."""
    model = make_model("mistral")
    first, second = random_ids(1, 20), random_ids(1, 20)
    second[0, 3] += 1
    a, b = model(first), model(second)
    torch.testing.assert_close(a[:, 12:], b[:, 12:], rtol=0, atol=0)
    assert (a[:, 11] - b[:, 11]).abs().amax() > 1e-4


@pytest.mark.parametrize(("name", "up"), [("llama", "gate_up_proj"), ("gpt2", "up_proj")])
@torch.inference_mode()
def test_adapt_gets_the_input_of_every_projection_and_adds_to_its_output(
    name: str, up: str
) -> None:
    """Adding W x doubles a projection, as doubling its weight does."""
    biases = ("attention_bias", "attention_output_bias", "mlp_bias")
    model = make_model(name, **dict.fromkeys(biases, False))
    doubled = make_model(name, **dict.fromkeys(biases, False))
    for key, parameter in doubled.named_parameters():
        if "_proj" in key:
            parameter.mul_(2.0)
    calls = []

    def adapt(layer_index: int, projection: str, x: torch.Tensor) -> torch.Tensor:
        calls.append((layer_index, projection))
        half = "self_attn" if projection in ("qkv_proj", "o_proj") else "mlp"
        added: torch.Tensor = model.get_submodule(f"layers.{layer_index}.{half}.{projection}")(x)
        return added

    ids, positions, attend = random_ids(2, 9), torch.arange(9), CausalAttention(model.config)
    found = model.hidden(ids, positions, attend, adapt)
    wanted = doubled.hidden(ids, positions, attend)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    names = ["qkv_proj", "o_proj", up, "down_proj"]
    assert calls == [(layer, name) for layer in range(2) for name in names]


@torch.inference_mode()
def test_adapt_that_adds_nothing_changes_nothing() -> None:
    model = make_model("llama")
    ids, positions, attend = random_ids(2, 9), torch.arange(9), CausalAttention(LLAMA)
    plain = model.hidden(ids, positions, attend)
    assert torch.equal(model.hidden(ids, positions, attend, lambda *_: None), plain)


@pytest.mark.parametrize("name", ["own-none", "own-sinusoidal", "own-learned-rmsnorm", "llama"])
@torch.inference_mode()
def test_positions_reach_the_model(name: str) -> None:
    """A row of two tokens, and the same row turned round: only positions tell the last from it."""
    model = make_model(name)
    first = model(torch.tensor([[7, 3, 5]]))[0, -1]
    turned = model(torch.tensor([[3, 7, 5]]))[0, -1]
    is_blind = bool((first - turned).abs().amax() < 1e-5)
    # Without positions two layers see the order all the same: by what each token saw itself.
    one_layer = make_model(name, num_layers=1)
    blind = one_layer(torch.tensor([[7, 3, 5]])) - one_layer(torch.tensor([[3, 7, 5]]))
    assert not is_blind
    assert bool(blind[0, -1].abs().amax() < 1e-5) == (name == "own-none")


def test_loss_of_fresh_weights_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = Transformer(LLAMA)
    ids = random_ids(4, 20)
    logits = model(ids)
    assert logits.dtype == torch.float32
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(torch.tensor(67.0).log().item(), abs=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2", "own-sinusoidal"])
def test_a_few_steps_of_gradient_descent_learn_a_row(name: str) -> None:
    model = Transformer(VARIANTS[name], dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = random_ids(1, 12)
    for _ in range(15):
        loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    # ln 67 = 4.2 at first.
    assert float(F.cross_entropy(model.eval()(ids)[0, :-1], ids[0, 1:]).detach()) < 3.0


def test_dropout_acts_in_training_only() -> None:
    model = Transformer(LLAMA, dropout=0.5)
    ids = random_ids(1, 5)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids), model(ids))


def test_weights_begin_as_stated_and_depend_on_the_seed_alone() -> None:
    config = dataclasses.replace(LLAMA, hidden_size=128, intermediate_size=256, num_layers=4)
    model = Transformer(dataclasses.replace(config, mlp_bias=True, tie_word_embeddings=False))
    model.initialize(torch.Generator().manual_seed(7))
    drawn = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, values in drawn.items():
        if name.endswith(".bias"):
            assert not values.any()
        elif "norm" in name:
            assert bool((values == 1).all())
        else:
            wanted = 0.02 / 8**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert float(values.std()) == pytest.approx(wanted, rel=0.1)
            assert float(values.mean()) == pytest.approx(0.0, abs=wanted / 5)
    torch.rand(3)
    model.initialize(torch.Generator().manual_seed(7))
    assert all(torch.equal(p.detach(), drawn[name]) for name, p in model.named_parameters())


@torch.inference_mode()
def test_bfloat16_model_keeps_exact_angles_and_gives_float32_logits() -> None:
    model = make_model("llama")
    exact = model(random_ids(1, 40))
    rounded = model.bfloat16()(random_ids(1, 40))
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().mean() / exact.abs().mean()
    assert float(error) < 0.03  # some roundings to 8 bits, at the last position as at the first


def test_autocast_trains_in_bfloat16() -> None:
    model = Transformer(LLAMA).train()
    ids = random_ids(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=0.02)
