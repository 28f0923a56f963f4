"""Every bound on what one request, one client or one file may ask for, in one object.

Routes, tests and documents read their bounds here, so that they cannot drift apart.
`llmserve serve --show-limits` prints the values in force.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import ConfigError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds in force for one server or one `LLM`. Every value is a positive number."""

    max_body_bytes: int = 1 << 20
    """Size of one HTTP request body."""
    max_json_depth: int = 32
    """Nesting of objects and arrays in a request body."""
    max_headers: int = 100
    """Header lines in one HTTP request."""
    max_header_bytes: int = 32 << 10
    """Size of all headers of one HTTP request."""
    header_timeout_s: float = 10.0
    """Time from a request's first byte to the end of its headers."""
    request_timeout_s: float = 30.0
    """Time from a request's first byte to the end of its body."""
    keep_alive_s: float = 5.0
    """Time an idle connection is kept open after a reply."""
    max_connections: int = 1024
    """Open connections, idle ones too."""
    write_stall_s: float = 30.0
    """Time a reader of a stream may take no data before its request is aborted."""
    max_error_bytes: int = 1024
    """Size of an error reply's body."""
    max_waiting_requests: int = 128
    """Sequences admitted but not yet running; beyond it the answer is 429."""
    max_waiting_tokens: int = 1 << 20
    """Prompt tokens admitted but not yet running; beyond it the answer is 429."""
    max_prompts: int = 64
    """Prompts in one completion request."""
    max_inputs: int = 1024
    """Texts in one request for embeddings, scores or classes."""
    max_choices: int = 16
    """`n` of one request."""
    max_sequences_per_request: int = 128
    """`n` times the number of prompts."""
    max_messages: int = 1024
    """Messages in one chat request."""
    max_tools: int = 128
    """Functions that one chat request offers."""
    max_stop_strings: int = 16
    """Entries of `stop`."""
    max_stop_chars: int = 256
    """Characters in one entry of `stop`."""
    max_stop_token_ids: int = 64
    """Entries of `stop_token_ids`."""
    max_logprobs: int = 20
    """Alternatives reported for each token."""
    max_logit_bias: int = 300
    """Entries of `logit_bias`."""
    max_allowed_token_ids: int = 4096
    """Entries of `allowed_token_ids`."""
    max_banned_token_ids: int = 300
    """Entries of `banned_token_ids`."""
    max_grammar_chars: int = 64 << 10
    """Length of a schema, expression or grammar that a text must match."""
    max_choice_texts: int = 256
    """Entries of `structured_outputs.choice`."""
    grammar_timeout_s: float = 1.0
    """Time for compiling it."""
    max_deadline_s: float = 300.0
    """Time from arrival to the end of a request."""
    engine_stall_s: float = 5.0
    """Time that an engine with work may make no step, or ten times its slowest one; then another
    takes its place."""
    drain_s: float = 30.0
    """Time that requests in flight get to end after SIGTERM."""
    max_template_bytes: int = 64 << 10
    """Size of a chat template."""
    template_timeout_s: float = 1.0
    """Time of rendering a chat prompt."""
    max_rendered_chars: int = 1 << 20
    """Length of a rendered chat prompt."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"limit {field.name} must be a positive number, got {value!r}")
