"""`genai_config.json`: what onnxruntime-genai needs to know to run an exported decoder.

Its own formats are documented with the package (version 0.18 was tried, docs/onnx.md). It cannot
count past the pad token, so a model without one is given an end token in its place.
"""

from __future__ import annotations

from typing import Any

from llmserve.config import ModelConfig
from llmserve.model_files import GRAPH_FILE

from .onnx_attention import cache_head_dim

__all__ = ["GENAI_FILE", "render_genai_config"]

GENAI_FILE = "genai_config.json"


def render_genai_config(config: ModelConfig) -> dict[str, Any]:
    """The file's content for the graph of a model that writes text."""
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if config.positions != "none":
        inputs["position_ids"] = "position_ids"
    ends = list(config.eos_token_ids) or [0]
    first = config.bos_token_id if config.bos_token_id is not None else ends[0]
    return {
        "model": {
            "type": "llama",  # names the loop that feeds it, not the layers
            "bos_token_id": first,
            "eos_token_id": ends,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else ends[0],
            "vocab_size": config.vocab_size,
            "context_length": config.max_seq_len,
            "decoder": {
                "filename": GRAPH_FILE,
                "session_options": {"provider_options": []},
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_size": cache_head_dim(config),
                "inputs": inputs
                | {
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_seq_len,
            "past_present_share_buffer": True,
        },
    }
