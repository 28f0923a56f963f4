"""Tests that let every file operation of an export fail, one after another."""

from __future__ import annotations

import pytest

__all__ = ["EVERY"]

EVERY = pytest.mark.parametrize(
    "every", [pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(600)]), 9]
)
"""Every operation in the soak (`make soak`), else every ninth."""
