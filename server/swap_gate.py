"""Whether a model may take another's place: both read a text, and the new one must not do worse.

The engines tell the log-probabilities of prompts, so a text is read as prompts that generate
nothing, beside the requests of clients. Divergence is that of the distributions over the likeliest
tokens that both tell of, and all others as one: by the data processing inequality never more than
the whole divergence (Cover & Thomas, Elements of Information Theory, section 2.8).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmserve.engine.request import Request
from llmserve.errors import ConfigError, RequestError
from llmserve.runners.protocol import TokenLogprobs
from llmserve.sampling import SamplingParams

from .probes import ask
from .service import ServedModel
from .settings import SwapSettings

__all__ = ["Reading", "SwapGate", "SwapRefusedError", "Verdict", "mean_divergence", "read_probe"]

MAX_PROBE_CHARS = 16 << 10
"""Of the text, no more is read: some four thousand tokens."""
WINDOW_TOKENS = 256
NUM_TOP = 64
"""Likeliest tokens of each position that are told."""
SMALLEST = 1e-9
"""The least probability that all other tokens together are given."""


class SwapRefusedError(RequestError):
    """The served model stays; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The new model against the old one, over the same text."""

    num_tokens: int
    """Tokens of the old model's that were predicted."""
    perplexity_ratio: float
    """The new model's over the old one's, for a token of the old one's."""
    mean_kl: float | None
    """Nats a token, at least; None where the models divide the text differently."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of a text."""

    token_ids: list[int]
    """The text's."""
    logprobs: list[TokenLogprobs]
    """One for each predicted token."""

    @property
    def loss(self) -> float:
        """Negative log likelihood of the whole text, nats."""
        return -sum(entry.logprob for entry in self.logprobs)


class SwapGate:
    """The gates of one server."""

    def __init__(self, settings: SwapSettings) -> None:
        self._settings = settings

    async def read(self, model: ServedModel, max_seq_len: int) -> Reading | None:
        """What a model makes of the probe text, in windows of that many tokens at most; None where
        no gate is set."""
        settings = self._settings
        if settings.max_kl is None and settings.max_perplexity is None:
            return None
        assert settings.probe is not None, "a gate without a text"
        return await _read(model, read_probe(settings.probe), min(WINDOW_TOKENS, max_seq_len))

    def compare(self, before: Reading, after: Reading) -> Verdict:
        """The new model's reading, the second, against the old one's.

        Raises:
            SwapRefusedError: it is worse than a gate allows, or cannot be compared.
        """
        num_tokens = len(before.logprobs)
        is_same_text = before.token_ids == after.token_ids
        verdict = Verdict(
            num_tokens=num_tokens,
            perplexity_ratio=math.exp(min((after.loss - before.loss) / num_tokens, 700.0)),
            mean_kl=mean_divergence(before.logprobs, after.logprobs) if is_same_text else None,
        )
        self._judge(verdict)
        return verdict

    def _judge(self, verdict: Verdict) -> None:
        ratio, most_ratio = verdict.perplexity_ratio, self._settings.max_perplexity
        if most_ratio is not None and not ratio <= most_ratio:
            raise SwapRefusedError(
                f"the new model's perplexity is {ratio:.3f} times the old one's; "
                f"--swap-max-perplexity allows {most_ratio:g}"
            )
        most_kl = self._settings.max_kl
        if most_kl is None:
            return
        if verdict.mean_kl is None:
            raise SwapRefusedError(
                "the models divide the probe text into different tokens, so there is no divergence "
                "to hold against --swap-max-kl: gate by --swap-max-perplexity"
            )
        if not verdict.mean_kl <= most_kl:
            raise SwapRefusedError(
                f"the new model diverges from the old one by {verdict.mean_kl:.4f} nats a token; "
                f"--swap-max-kl allows {most_kl:g}"
            )


def read_probe(path: Path) -> str:
    """The beginning of the probe text.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_PROBE_CHARS)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the probe text {path} cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"the probe text {path} is empty: give some paragraphs")
    return text


def mean_divergence(before: Sequence[TokenLogprobs], after: Sequence[TokenLogprobs]) -> float:
    """Mean Kullback-Leibler divergence of `after` from `before`, a lower bound; nats a position.

    Each entry tells the likeliest tokens and their log-probabilities; the rest is one event.
    """
    pairs = zip(before, after, strict=True)
    return sum(_divergence(dict(one.top), dict(other.top)) for one, other in pairs) / len(before)


def _divergence(before: dict[int, float], after: dict[int, float]) -> float:
    common = before.keys() & after.keys()
    total = sum(math.exp(before[one]) * (before[one] - after[one]) for one in common)
    rest = max(1.0 - sum(math.exp(before[one]) for one in common), SMALLEST)
    other_rest = max(1.0 - sum(math.exp(after[one]) for one in common), SMALLEST)
    return max(0.0, total + rest * math.log(rest / other_rest))


async def _read(model: ServedModel, text: str, window: int) -> Reading:
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    start = [] if model.tokenizer.bos_token_id is None else [model.tokenizer.bos_token_id]
    step = window - len(start)
    pieces = [[*start, *token_ids[at : at + step]] for at in range(0, len(token_ids), step)]
    num_top = min(NUM_TOP, model.engine.info.vocab_size)
    params = SamplingParams(max_tokens=0, prompt_logprobs=num_top)
    requests = [
        Request(request_id=uuid.uuid4().hex, prompt_token_ids=piece, sampling_params=params, seed=0)
        for piece in pieces
        if len(piece) > 1
    ]
    if not requests:
        raise SwapRefusedError("the probe text is too short: give some paragraphs")
    logprobs: list[TokenLogprobs] = []
    for request in requests:  # one by one: clients' requests go on meanwhile
        ends = await ask(model.engine, [request])
        logprobs += ends[request.request_id].prompt_logprobs
    return Reading(token_ids, logprobs)
