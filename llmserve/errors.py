"""Every error that llmserve raises on purpose.

    LLMServeError
    ├── ConfigError            (ValueError)  a setting or option that cannot be used
    ├── CheckpointError                      a model folder missing, torn or not what it says
    ├── DataError              (ValueError)  a corpus, token file or label table that cannot be used
    ├── TrainingError                        a run that cannot start or go on
    ├── ExportError                          an export that failed or missed its stated tolerance
    ├── MissingDependencyError (ImportError) a feature whose extra is not installed
    ├── RequestError           (ValueError)  one request; `param` names the field at fault
    │   ├── PromptTooLongError
    │   └── TemplateError
    ├── OverloadedError                      a well-formed request refused for lack of room
    └── EngineError                          the engine failed while serving
        └── EngineDeadError                  the engine process is gone

Messages say what was given, what is allowed and what to do. The server maps classes to HTTP
statuses in one table; the command line prints the message alone and exits with code 1 (2 for
`ConfigError`).
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineDeadError",
    "EngineError",
    "ExportError",
    "LLMServeError",
    "MissingDependencyError",
    "OverloadedError",
    "PromptTooLongError",
    "RequestError",
    "TemplateError",
    "TrainingError",
]


class LLMServeError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(LLMServeError, ValueError):
    """A setting or a combination of settings that cannot be used."""


class CheckpointError(LLMServeError):
    """A model folder or one of its files that cannot be used; the message names the file."""


class DataError(LLMServeError, ValueError):
    """Training or evaluation data that cannot be used."""


class TrainingError(LLMServeError):
    """A training run that cannot start or go on."""


class ExportError(LLMServeError):
    """An export that failed, or that missed the tolerance it states."""


class MissingDependencyError(LLMServeError, ImportError):
    """A feature that needs an extra that is not installed."""

    def __init__(self, package: str, *, extra: str, feature: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed: "
            f"pip install 'llmserve[{extra}]'"
        )
        self.package = package
        self.extra = extra


class RequestError(LLMServeError, ValueError):
    """A request that cannot be served as asked; `param` is the field at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """A prompt that leaves no room for an answer, or that could never fit in the KV cache."""

    def __init__(self, *, prompt_tokens: int, limit: int, param: str | None = "prompt") -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens; this model accepts at most {limit}",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class TemplateError(RequestError):
    """A chat template that is missing, refused or failed on the given messages."""


class OverloadedError(LLMServeError):
    """No room for one more request at present; `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(LLMServeError):
    """The engine failed while it served a request."""


class EngineDeadError(EngineError):
    """The engine process ended; nothing it held can be finished."""
