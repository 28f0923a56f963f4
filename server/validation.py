"""Strict models, and what a failed validation says."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Strict", "first_fault"]


class Strict(BaseModel):
    """A model that coerces nothing and knows no other field."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not known",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "model_type": "must be an object",
}


def first_fault(error: ValidationError) -> tuple[str, str]:
    """The field at fault, and a sentence about it that does not quote the input."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part)[:64] for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = _SENTENCES.get(fault["type"], message)
    return path, message if message.startswith(path) else f"{path} {message}"
