"""What a caller may ask of the sampler: one validated, immutable object per request.

The numbers behind the names are defined once, in docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import RequestError
from .limits import Limits

__all__ = ["MAX_SEED", "SamplingParams", "check_token_ids"]

MAX_SEED = 2**63 - 1
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Raises `RequestError` (with `param`) for a value outside its range.
    """

    max_tokens: int | None = None
    """Most tokens to generate for each choice; None: as many as the context holds; 0: none."""
    min_tokens: int = 0
    """Tokens before which no stop id may be generated."""
    n: int = 1
    """Independent choices for one prompt."""
    temperature: float = 1.0
    """0 is greedy, ties to the lowest id; otherwise logits are divided by it. 0..100."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches it. (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest. 0..1."""
    typical_p: float = 1.0
    """Keep the smallest set of most typical tokens whose probability reaches it. (0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated. -2..2."""
    frequency_penalty: float = 0.0
    """Subtracted once per earlier occurrence among the generated tokens. -2..2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen, the prompt's too. (0, 10]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of the given ids. Each -100..100."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Ids that may be generated; None: all."""
    banned_token_ids: tuple[int, ...] = ()
    """Ids that may not be generated."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence besides the model's own end ids."""
    ignore_eos: bool = False
    """Go on past the model's own end ids."""
    include_stop: bool = False
    """Keep the stop string that ended the text in it."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many likeliest ones; None: neither."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, the first one left out."""
    seed: int | None = None
    """Key of the request's random numbers, 0..2**63-1; None: one is drawn at arrival."""

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0, MAX_TOKENS, none=True)
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        _check_int("n", self.n, 1, MAX_TOKENS)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, -1, MAX_TOKENS)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        self._check_ids()
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop takes non-empty strings", param="stop")
        _check_int("logprobs", self.logprobs, 0, MAX_TOKENS, none=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOKENS, none=True)
        _check_int("seed", self.seed, 0, MAX_SEED, none=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}",
                param="min_tokens",
            )

    def _check_ids(self) -> None:
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, MAX_TOKENS)
            _check_number("logit_bias", bias, -100.0, 100.0)
        for name in ("stop_token_ids", "banned_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _check_int(name, token_id, 0, MAX_TOKENS)
        if self.allowed_token_ids is None:
            return
        left = set(self.allowed_token_ids) - set(self.banned_token_ids)
        if not left:
            raise RequestError(
                "allowed_token_ids leaves no id to generate: name one that is not banned",
                param="allowed_token_ids",
            )
        if self.min_tokens > 0 and left <= set(self.stop_token_ids):
            raise RequestError(
                f"min_tokens is {self.min_tokens}, but every allowed id is a stop id: name an "
                "allowed id that is none",
                param="min_tokens",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    def check_limits(self, limits: Limits) -> None:
        """Raise `RequestError` where a list or count exceeds what `limits` allows."""
        _check_most("n", self.n, limits.max_choices)
        _check_most("stop", len(self.stop), limits.max_stop_strings)
        _check_most("stop", max(map(len, self.stop), default=0), limits.max_stop_chars)
        _check_most("stop_token_ids", len(self.stop_token_ids), limits.max_stop_token_ids)
        _check_most("logprobs", self.logprobs or 0, limits.max_logprobs)
        _check_most("prompt_logprobs", self.prompt_logprobs or 0, limits.max_logprobs)
        _check_most(
            "allowed_token_ids", len(self.allowed_token_ids or ()), limits.max_allowed_token_ids
        )
        _check_most("banned_token_ids", len(self.banned_token_ids), limits.max_banned_token_ids)
        _check_most("logit_bias", len(self.logit_bias), limits.max_logit_bias)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise `RequestError` for an id outside 0..vocab_size-1, or where all of them are banned.

        `vocab_size` is the width of the model's output.
        """
        check_token_ids(self.logit_bias, vocab_size, param="logit_bias")
        check_token_ids(self.stop_token_ids, vocab_size, param="stop_token_ids")
        check_token_ids(self.banned_token_ids, vocab_size, param="banned_token_ids")
        check_token_ids(self.allowed_token_ids or (), vocab_size, param="allowed_token_ids")
        if len(set(self.banned_token_ids)) == vocab_size:
            raise RequestError(
                f"banned_token_ids names all {vocab_size} ids of this model: leave one out",
                param="banned_token_ids",
            )


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    """Raise `RequestError` naming the first of `token_ids` that is not in 0..vocab_size-1."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} holds the id {token_id}; this model's ids are 0 to {vocab_size - 1}",
                param=param,
            )


def _check_int(name: str, value: object, low: int, high: int, *, none: bool = False) -> None:
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"{name} must be a whole number from {low} to {high}, got {value!r}", param=name
        )


def _check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        above = low < value if open_low else low <= value
        if above and value <= high:  # false for NaN
            return
    interval = f"{'above' if open_low else 'from'} {low:g} to {high:g}"
    raise RequestError(f"{name} must be a number {interval}, got {value!r}", param=name)


def _check_most(name: str, given: int, most: int) -> None:
    if given > most:
        raise RequestError(f"{name} is {given}; this server allows at most {most}", param=name)
