"""The outermost layer of the application: what every request passes before any route sees it.

Header bounds, the `Host` allow-list, keys (routes find the caller's tenant and account in
`request.state`); on
the way out the security headers, the request id, and one line of log that holds neither prompts nor
keys.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Access
from .error_replies import plain_error
from .rate_budgets import Account, RateBudgets
from .server_state import ServerState
from .trace_export import HttpSpan, SpanExport

__all__ = ["SECURITY_HEADERS", "Guard"]

SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Sent with every reply."""

CLIENT_LEFT = 499
"""Logged and counted for a client that left before the reply began; never sent."""

MAX_LOGGED_PATH = 120

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger("llmserve.access")


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._budgets = RateBudgets(state.settings.keys.budgets())
        self._host_names = frozenset(state.settings.host_names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        request_id = _request_id(scope)
        status = CLIENT_LEFT

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *SECURITY_HEADERS,
                    (b"x-request-id", request_id),
                    *([(b"connection", b"close")] if self._state.is_draining else ()),
                ]
            await send(message)

        try:
            reply = self._refusal(scope) or self._app
            with self._state.visitors.inside():
                await reply(scope, receive, guarded_send)
        finally:
            ended = time.monotonic()
            self._account(scope, status, ended - started, request_id)
            if self._state.spans is not None:
                self._export(self._state.spans, scope, status, started, ended, request_id)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The reply to a request that no route may see."""
        limits = self._state.limits
        headers = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        if len(headers) > limits.max_headers or size > limits.max_header_bytes:
            return plain_error(
                limits,
                431,
                f"the request has {len(headers)} headers of {size} bytes; this server allows "
                f"{limits.max_headers} of {limits.max_header_bytes} bytes together",
            )
        names = [name for name, _ in headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            return plain_error(limits, 400, "the request gives its body's length in two ways")
        if self._host_names and _host_of(scope) not in self._host_names:
            return plain_error(
                limits,
                421,
                "this server does not go by the name in the Host header (see --allowed-hosts)",
            )
        return self._check_key(scope)

    def _check_key(self, scope: Scope) -> ASGIApp | None:
        limits = self._state.limits
        caller = self._state.settings.keys.check(scope)
        if caller.access is Access.GRANTED:
            account = Account(self._budgets, caller.tenant)
            scope["state"] = {
                **scope.get("state", {}),
                "tenant": caller.tenant,
                "account": account,
            }
            return None
        if caller.access is Access.FORBIDDEN:
            return plain_error(limits, 403, "this key is not meant for this route")
        headers = {"www-authenticate": "Bearer"}
        message = "give an API key this server knows: Authorization: Bearer KEY"
        return plain_error(limits, 401, message, headers=headers)

    def _account(self, scope: Scope, status: int, duration_s: float, request_id: bytes) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._state.metrics.count_reply(route, scope["method"], status, duration_s)
        if _log.isEnabledFor(logging.INFO):
            _log.info(
                "%s %s %d %.1f ms %s",
                _plain(scope["method"]),
                _plain(scope["path"]),
                status,
                duration_s * 1e3,
                request_id.decode(),
                extra={
                    "fields": {
                        "method": _plain(scope["method"]),
                        "path": _plain(scope["path"]),
                        "status": int(status),
                        "duration_ms": round(duration_s * 1e3, 3),
                        "request_id": request_id.decode(),
                    }
                },
            )

    def _export(
        self,
        spans: SpanExport,
        scope: Scope,
        status: int,
        started: float,
        ended: float,
        request_id: bytes,
    ) -> None:
        state = scope.get("state", {})
        engine_id, tenant = state.get("engine_request_id", ""), state.get("tenant", "")
        http = HttpSpan(
            method=_plain(scope["method"]),
            route=getattr(scope.get("route"), "path", "unmatched"),
            status=int(status),
            started=started,
            ended=ended,
            request_id=request_id.decode(),
            headers={
                name.decode(): value.decode("latin-1")
                for name, value in scope["headers"]
                if name in (b"traceparent", b"tracestate")
            },
        )
        spans.export(http, self._state.traces.find(engine_id, tenant))


def _request_id(scope: Scope) -> bytes:
    """The client's own id where it is a plain word, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()


def _host_of(scope: Scope) -> str:
    """The `Host` header without its port; empty when there is none, or more than one."""
    values = [value for name, value in scope["headers"] if name == b"host"]
    if len(values) != 1:
        return ""
    host: str = values[0].decode("latin-1").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _plain(text: str) -> str:
    """A client's text for the log: short, and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_LOGGED_PATH])
