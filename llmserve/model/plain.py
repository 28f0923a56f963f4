"""The plain loop: one sequence, greedy, over a dense cache.

What serving is compared with: the same tokens (the oracle of engine and exports), and the speed of
one stream without an engine (the baseline of the benchmarks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError
from .attention import DenseCache
from .transformer import Transformer

__all__ = ["generate_plain"]


@torch.inference_mode()
def generate_plain(
    model: Transformer, prompt_token_ids: Sequence[int], max_new_tokens: int
) -> list[int]:
    """The likeliest continuation, token by token; ties to the lowest id; end ids are ignored.

    Raises:
        ConfigError: an empty prompt, or more tokens than the context holds.
    """
    length = len(prompt_token_ids) + max_new_tokens
    if not prompt_token_ids or length > model.config.max_seq_len:
        raise ConfigError(
            f"{len(prompt_token_ids)} prompt tokens and {max_new_tokens} new ones; the prompt "
            f"needs at least 1, and the context holds {model.config.max_seq_len}"
        )
    weight = model.embed_tokens.weight
    cache = DenseCache(model.config, max_len=length, dtype=weight.dtype, device=weight.device)
    token_ids = torch.tensor([list(prompt_token_ids)], device=weight.device)
    generated: list[int] = []
    for _ in range(max_new_tokens):
        start = cache.length
        positions = torch.arange(start, start + token_ids.shape[1], device=weight.device)
        hidden = model.hidden(token_ids, positions, cache)
        row = model.logits(hidden[0, -1]).cpu().numpy()
        generated.append(int(row.argmax()))  # numpy's argmax takes the first of equals
        token_ids = torch.tensor([generated[-1:]], device=weight.device)
    return generated
