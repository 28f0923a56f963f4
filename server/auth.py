"""Who may call what: keys, scopes, and the one table that says which route needs which.

Every route needs a key with the scope `user` unless the table says otherwise, so a new route is
closed until somebody opens it. Keys are kept as digests and all of them are compared in constant
time. Without any keys (possible on loopback only, unless asked for) everybody may call everything.

A key also names its tenant: the one on whose account a request runs.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError

from .page_files import PAGE_FILES
from .rate_budgets import Budget

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["PUBLIC_PATHS", "Access", "Caller", "Key", "KeyRing", "RouteScope", "required_scope"]

TENANT_CHARS = 16
"""Hexadecimal digits of a key's digest that name its tenant."""


class RouteScope(StrEnum):
    """What a key is good for."""

    USER = "user"
    """Inference and what belongs to it."""
    METRICS = "metrics"
    """Counters of the whole server."""
    ADMIN = "admin"
    """How the server is set up."""


class Access(StrEnum):
    """The answer to a call."""

    GRANTED = "granted"
    UNKNOWN = "unknown"
    """No key or a wrong one: 401."""
    FORBIDDEN = "forbidden"
    """A key without the route's scope: 403."""


PUBLIC_PATHS = frozenset({"/health", "/ready", *PAGE_FILES})
"""Paths that need no key: probes and the page, which holds no secrets."""

SCOPES = {
    "/metrics": RouteScope.METRICS,
    "/kv-blocks": RouteScope.METRICS,
    "/limits": RouteScope.ADMIN,
    "/admin/models/load": RouteScope.ADMIN,
}


def required_scope(path: str) -> RouteScope | None:
    """The scope that `path` needs; None for public ones."""
    if path in PUBLIC_PATHS:
        return None
    return SCOPES.get(path, RouteScope.USER)


@dataclass(frozen=True, slots=True)
class Key:
    """A key's digest and what it opens; the key itself is not kept."""

    digest: bytes
    scopes: frozenset[RouteScope]
    name: str | None = None
    """What the operator calls it."""
    budget: Budget | None = None
    """What it may use in a minute; None: as much as it can."""

    @classmethod
    def of(
        cls,
        secret: str,
        scopes: Iterable[RouteScope],
        *,
        name: str | None = None,
        budget: Budget | None = None,
    ) -> Key:
        """The digest of `secret`, for `scopes`."""
        return cls(hashlib.sha256(secret.encode()).digest(), frozenset(scopes), name, budget)

    @property
    def tenant(self) -> str:
        """On whose account its requests run: the beginning of the digest, in hexadecimal."""
        return _tenant_of(self.digest)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as the server must know."""

    access: Access
    tenant: str = ""
    """Empty where no key was asked for."""


class KeyRing:
    """All keys of a server."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        """Raises `ConfigError` where two keys go by one name."""
        self._keys = tuple(keys)
        self._tenants: dict[str, str] = {}
        for key in self._keys:
            if key.name is not None and self._tenants.setdefault(key.name, key.tenant) != (
                key.tenant
            ):
                raise ConfigError(f"two keys have the name {key.name!r}: give each its own")

    @property
    def is_empty(self) -> bool:
        """Whether the server asks for no key."""
        return not self._keys

    def budgets(self) -> dict[str, Budget]:
        """What the tenants may use in a minute; those without bounds are left out."""
        return {key.tenant: key.budget for key in self._keys if key.budget is not None}

    def tenant_named(self, name: str) -> str:
        """The tenant of the key that the operator calls `name`.

        Raises `ConfigError` where no key has that name.
        """
        if name not in self._tenants:
            known = ", ".join(self._tenants) or "none; write KEY name=NAME in a key file"
            raise ConfigError(f"no key has the name {name!r}; named keys: {known}")
        return self._tenants[name]

    def check(self, scope: Scope) -> Caller:
        """May this request be served, and on whose account? Reads its path and headers only."""
        required = required_scope(scope["path"])
        if required is None or self.is_empty:
            return Caller(Access.GRANTED)
        secret = _secret_of(scope)
        if secret is None:
            return Caller(Access.UNKNOWN)
        digest = hashlib.sha256(secret).digest()
        scopes = self._scopes_of(digest)
        if not scopes:
            return Caller(Access.UNKNOWN)
        access = Access.GRANTED if required in scopes else Access.FORBIDDEN
        return Caller(access, _tenant_of(digest))

    def _scopes_of(self, digest: bytes) -> frozenset[RouteScope]:
        found: frozenset[RouteScope] = frozenset()
        for key in self._keys:  # all of them: the time taken does not tell which one matched
            if hmac.compare_digest(key.digest, digest):
                found |= key.scopes
        return found


def _tenant_of(digest: bytes) -> str:
    return digest.hex()[:TENANT_CHARS]


def _secret_of(scope: Scope) -> bytes | None:
    """The key in `Authorization: Bearer` or `X-Api-Key`."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip())
        if name == b"x-api-key":
            return bytes(value.strip())
    return None
