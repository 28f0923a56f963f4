"""The log: lines for people, or one JSON object a line for programs. No prompts, no keys."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

__all__ = ["JsonFormatter", "start_log"]

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

FIELDS = "fields"
"""Attribute of a record that holds its facts by name (`extra={"fields": {...}}`)."""


class JsonFormatter(logging.Formatter):
    """One object: time, level, logger, message, and the record's facts by name."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. Whatever a client sent is escaped, as JSON does."""
        when = datetime.fromtimestamp(record.created, UTC)
        told: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)


def start_log(log_format: str) -> None:
    """Write the process' log to standard error, as `text` or as `json`."""
    handler = logging.StreamHandler()
    is_json = log_format == "json"
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(handlers=[handler])
