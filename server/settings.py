"""One server's settings, and the only place that reads keys from files and the environment."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llmserve.errors import ConfigError
from llmserve.limits import Limits

from .auth import Key, KeyRing, RouteScope
from .engine_launch import API_KEY_VARIABLE
from .engine_settings import EngineSettings
from .rate_budgets import Budget

__all__ = ["ModelSettings", "ServerSettings", "SwapSettings", "is_loopback", "load_keys"]

MAX_REPLICAS = 64
MAX_MODELS = 16
MIN_KEY_CHARS = 8
KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY_COUNTS = ("requests_per_minute", "tokens_per_minute")
MAX_KEY_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSettings:
    """Which models may take the place of the served one."""

    root: Path | None = None
    """Folder that they must lie in; None: the one that the model lay in at the start."""
    drains: bool = False
    """Whether the old model ends before the new one is loaded: no memory for both is needed, and
    new requests get 503 meanwhile."""
    probe: Path | None = None
    """Text that both models read, for the gates."""
    max_kl: float | None = None
    """Most divergence from the old model, nats a token; None: any."""
    max_perplexity: float | None = None
    """Most perplexity, as a multiple of the old model's; None: any."""

    def __post_init__(self) -> None:
        for name in ("max_kl", "max_perplexity"):
            value = getattr(self, name)
            if value is None:
                continue
            option = "--swap-" + name.replace("_", "-")
            if not 0 < value < math.inf:
                raise ConfigError(f"{option} must be above 0, got {value:g}")
            if self.probe is None:
                raise ConfigError(f"{option} needs a text: give --swap-probe FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One model of a server."""

    engine: EngineSettings
    """What its engine processes load."""
    names: tuple[str, ...] = ()
    """Names that clients may use for it, the first one in replies; empty: the folder's."""
    chat_template: Path | None = None
    """A template that replaces the model folder's."""
    num_replicas: int = 1
    """Engine processes."""
    num_prefill_engines: int = 0
    """Engine processes that only read prompts, beside those."""

    def __post_init__(self) -> None:
        self._check_prefill_engines()
        if not 1 <= self.num_replicas <= MAX_REPLICAS:
            raise ConfigError(
                f"--replicas must be from 1 to {MAX_REPLICAS}, got {self.num_replicas}"
            )

    def _check_prefill_engines(self) -> None:
        count, engine = self.num_prefill_engines, self.engine
        if not 0 <= count <= MAX_REPLICAS:
            raise ConfigError(f"--prefill-engines must be from 0 to {MAX_REPLICAS}, got {count}")
        if not count:
            return
        if not engine.has_prefix_cache:
            raise ConfigError(
                "--prefill-engines hand over through the prefix cache: leave out "
                "--no-enable-prefix-caching"
            )
        if engine.record is not None:
            raise ConfigError(
                "--record cannot be replayed where KV blocks come from other engines: leave out "
                "--prefill-engines"
            )
        if engine.runner in ("torch", "onnx"):
            raise ConfigError(
                f"--prefill-engines needs the native runner: the {engine.runner} runner cannot "
                "hand KV blocks over"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Everything that `llmserve serve` can be told."""

    models: tuple[ModelSettings, ...]
    """At least one; each has engines of its own."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    limits: Limits = field(default_factory=Limits)
    """Bounds on requests and connections."""
    keys: KeyRing = field(default_factory=KeyRing)
    """Who may call."""
    swap: SwapSettings = field(default_factory=SwapSettings)
    """Which models may take the place of those at the start."""
    shares_prefix_cache: bool = False
    """Whether requests of different keys share prefix-cache blocks."""
    allow_unauthenticated: bool = False
    """Whether an address beyond this machine may be served without keys."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the `Host` header may have; empty: on loopback its own names, else any."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call; empty: the server's own page alone."""
    ignore_unknown_fields: bool = False
    """Whether unknown request fields are skipped and not refused."""
    metrics_prefix: str = "llmserve"
    """`llmserve`, or `vllm` for boards that were made for its names."""
    otlp_endpoint: str | None = None
    """URL that OpenTelemetry spans are sent to; None: none are made."""
    http_parser: str = "auto"
    """`httptools`, `h11`, or `auto`: httptools where it is installed."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.models) <= MAX_MODELS:
            raise ConfigError(
                f"a server takes from 1 to {MAX_MODELS} models, got {len(self.models)}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        if self.keys.is_empty and not self.allow_unauthenticated and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} can be reached from other machines and no API keys are set: give "
                f"--api-key-file (or {API_KEY_VARIABLE}), listen on 127.0.0.1, or say "
                "--allow-unauthenticated"
            )
        if self.shares_prefix_cache and not all(
            model.engine.has_prefix_cache for model in self.models
        ):
            raise ConfigError(
                "--share-prefix-cache needs the prefix cache: leave out --no-enable-prefix-caching"
            )

    @property
    def host_names(self) -> tuple[str, ...]:
        """Names that the `Host` header may have; empty: any."""
        if self.allowed_hosts or not is_loopback(self.host):
            return self.allowed_hosts
        return ("localhost", "127.0.0.1", "::1", self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_keys(
    *, user_file: Path | None, metrics_file: Path | None, admin_file: Path | None
) -> KeyRing:
    """Keys from files and from the environment.

    A line of a file is `KEY`, and after it what may be said of the key: `name=NAME`,
    `requests_per_minute=COUNT`, `tokens_per_minute=COUNT`; one that begins with `#` is a comment.

    Raises `ConfigError` for a file without keys, a key that is too short or not printable, a name
    that two keys have, or something else said of a key.
    """
    keys = []
    if API_KEY_VARIABLE in os.environ:
        source = f"the variable {API_KEY_VARIABLE}"
        keys.append(_key(os.environ[API_KEY_VARIABLE], {RouteScope.USER}, source))
    for path, scopes in (
        (user_file, {RouteScope.USER}),
        (metrics_file, {RouteScope.METRICS}),
        (admin_file, set(RouteScope)),
    ):
        if path is not None:
            keys += [_parse_line(line, scopes, f"key file {path}") for line in _read_lines(path)]
    return KeyRing(keys)


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"key file {path} is not text") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"key file {path} is larger than {MAX_KEY_FILE_BYTES} bytes")
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"key file {path} holds no keys: write one key a line")
    return lines


def _parse_line(line: str, scopes: Iterable[RouteScope], source: str) -> Key:
    secret, *words = (word for word in line.split(" ") if word)
    said = dict(word.partition("=")[::2] for word in words)
    if len(said) < len(words) or said.keys() - {"name", *KEY_COUNTS}:
        raise ConfigError(
            f"a key in {source} holds a space, or is followed by something else than name=NAME, "
            f"{KEY_COUNTS[0]}=COUNT or {KEY_COUNTS[1]}=COUNT, each once"
        )
    name = said.pop("name", None)
    if name is not None and not KEY_NAME.fullmatch(name):
        raise ConfigError(
            f"a key's name in {source} is empty, holds a space, or is no word of up to 64 letters, "
            "digits, '.', '_' and '-'"
        )
    counts = {word: _parse_count(word, text, source) for word, text in said.items()}
    return _key(secret, scopes, source, name=name, budget=Budget(**counts) if counts else None)


def _parse_count(word: str, text: str, source: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise ConfigError(f"{word} in {source} takes a whole number, got {text[:20]!r}")
    return int(text)


def _key(
    secret: str,
    scopes: Iterable[RouteScope],
    source: str,
    *,
    name: str | None = None,
    budget: Budget | None = None,
) -> Key:
    """A usable key. The message never holds the key."""
    if len(secret) < MIN_KEY_CHARS:
        raise ConfigError(f"a key in {source} has fewer than {MIN_KEY_CHARS} characters")
    if not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise ConfigError(f"a key in {source} holds a space or a character outside ASCII")
    return Key.of(secret, scopes, name=name, budget=budget)
