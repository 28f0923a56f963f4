"""Which CUDA device an engine takes, where several engines compute one model."""

from __future__ import annotations

import torch

__all__ = ["nth_device"]


def nth_device(index: int, *, num_ranks: int) -> str:
    """The first device of engine `index`, each of which has `num_ranks` of them in a row.

    More engines than there are devices for share them. `cuda` where there are too few for one.
    """
    num_places = torch.cuda.device_count() // num_ranks
    return f"cuda:{index % num_places * num_ranks}" if num_places else "cuda"
