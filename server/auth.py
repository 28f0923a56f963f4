"""Who may call what: keys, scopes, and the one table that says which route needs which.

Every route needs a key with the scope `user` unless the table says otherwise, so a new route is
closed until somebody opens it. Keys are kept as digests and all of them are compared in constant
time. Without any keys (possible on loopback only, unless asked for) everybody may call everything.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from starlette.types import Scope

from .page import PAGE_FILES

__all__ = ["PUBLIC_PATHS", "Access", "Key", "KeyRing", "RouteScope", "required_scope"]


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

SCOPES = {"/metrics": RouteScope.METRICS, "/limits": RouteScope.ADMIN}


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

    @classmethod
    def of(cls, secret: str, scopes: Iterable[RouteScope]) -> Key:
        """The digest of `secret`, for `scopes`."""
        return cls(hashlib.sha256(secret.encode()).digest(), frozenset(scopes))


class KeyRing:
    """All keys of a server."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)

    @property
    def is_empty(self) -> bool:
        """Whether the server asks for no key."""
        return not self._keys

    def check(self, scope: Scope) -> Access:
        """May this request be served? Reads its path and headers only."""
        required = required_scope(scope["path"])
        if required is None or self.is_empty:
            return Access.GRANTED
        secret = _secret_of(scope)
        if secret is None:
            return Access.UNKNOWN
        scopes = self._scopes_of(secret)
        if not scopes:
            return Access.UNKNOWN
        return Access.GRANTED if required in scopes else Access.FORBIDDEN

    def _scopes_of(self, secret: bytes) -> frozenset[RouteScope]:
        digest = hashlib.sha256(secret).digest()
        found: frozenset[RouteScope] = frozenset()
        for key in self._keys:  # all of them: the time taken does not tell which one matched
            if hmac.compare_digest(key.digest, digest):
                found |= key.scopes
        return found


def _secret_of(scope: Scope) -> bytes | None:
    """The key in `Authorization: Bearer` or `X-Api-Key`."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip())
        if name == b"x-api-key":
            return bytes(value.strip())
    return None
