"""Rows and documents of a comparison with other programs, made up."""

from __future__ import annotations

from typing import Any


def row(engine: str, scheme: str = "int4", surface: str = "process", **figures: Any) -> Any:
    """A contender; `decode_8_tokens__s` stands for the figure `decode 8 tokens/s`."""
    named = {name.replace("__", "/").replace("_", " "): runs for name, runs in figures.items()}
    return {
        "surface": surface,
        "scheme": scheme,
        "is_ours": engine.startswith("llmserve"),
        "engine": engine,
        "weights": f"{scheme} weights, int8 head",
        "cache": "bf16",
        "versions": {engine: "1.0"},
        "figures": named,
        "problem": None,
    }


def rates(engine: str, runs: list[float], scheme: str = "int4") -> Any:
    """A contender with rates of decoding 8 sequences."""
    made = row(engine, scheme)
    made["figures"]["decode 8 tokens/s"] = runs
    return made


def document(rows: list[Any]) -> dict[str, Any]:
    """A comparison in process and over HTTP, of a model that no bars are set for."""
    return {
        "date": "20261128-120000",
        "model": "M",
        "shape": None,
        "prefill_len": 512,
        "input_len": 128,
        "decode_len": 64,
        "sequences": [8],
        "load": {"requests": {"8": 16}, "input_len": 128, "output_len": 128},
        "rows": rows,
        "machine": {"cores": 2, "cpu": "a processor", "memory_bytes": 1 << 34},
        "command": "llmserve bench peers M",
    }
