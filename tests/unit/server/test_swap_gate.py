from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from llmserve.errors import ConfigError
from llmserve.runners.protocol import TokenLogprobs
from llmserve.server.settings import SwapSettings
from llmserve.server.swap_gate import MAX_PROBE_CHARS, mean_divergence, read_probe


def entry(logprobs: np.ndarray, num_top: int) -> TokenLogprobs:
    """As a runner tells a position's distribution."""
    order = np.argsort(-logprobs, kind="stable")[:num_top]
    return TokenLogprobs(0.0, tuple((int(one), float(logprobs[one])) for one in order))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


def test_divergence_is_the_whole_one_or_less_and_the_whole_one_where_all_is_told() -> None:
    generator = np.random.default_rng(0)
    whole, pairs = [], []
    for _ in range(20):
        before = log_softmax(generator.normal(0, 3, 50))
        after = log_softmax(np.log(np.exp(before)) + generator.normal(0, 0.3, 50))
        whole.append(float((np.exp(before) * (before - after)).sum()))
        pairs.append((before, after))
    told = {
        num_top: mean_divergence(
            [entry(before, num_top) for before, _ in pairs],
            [entry(after, num_top) for _, after in pairs],
        )
        for num_top in (5, 20, 50)
    }
    assert told[50] == pytest.approx(np.mean(whole), rel=1e-9)
    assert 0 < told[5] <= told[20] <= told[50] * (1 + 1e-9)


def test_equal_models_do_not_diverge() -> None:
    one = [entry(log_softmax(np.random.default_rng(1).normal(0, 3, 50)), 8)]
    assert mean_divergence(one, one) == 0.0


def test_models_without_a_common_token_diverge() -> None:
    before = [TokenLogprobs(0.0, ((1, math.log(0.9)),))]
    after = [TokenLogprobs(0.0, ((2, math.log(0.9)),))]
    assert mean_divergence(before, after) == 0.0, "nothing is known of them: no more than the bound"


def test_a_probe_is_read_as_far_as_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "probe.txt"
    path.write_text("é" * (2 * MAX_PROBE_CHARS), encoding="utf-8")
    assert read_probe(path) == "é" * MAX_PROBE_CHARS
    for content, message in ((b" \n", "is empty"), (b"\xff\xfe", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_probe(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_probe(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": 0.1}, "--swap-max-kl needs a text"),
        ({"max_perplexity": 0.0, "probe": Path("x")}, "--swap-max-perplexity must be above 0"),
        ({"max_kl": math.nan, "probe": Path("x")}, "--swap-max-kl must be above 0"),
    ],
)
def test_gates_that_cannot_be_used_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SwapSettings(**settings)  # type: ignore[arg-type]
