"""When requests are meant to be sent: an open-loop schedule fixed before the run.

Open loop: users come whether or not the server keeps up, so the times are drawn beforehand and
never move; latency is counted from them. A closed loop has no schedule: each of N clients sends
its next request when its last was answered (`load.py`).

Gaps are gamma distributed with mean 1/rate and shape `burstiness`: 1 is a Poisson process, below
1 burstier, above 1 more even; the squared coefficient of variation of a gap is 1/burstiness.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from llmserve.errors import ConfigError

__all__ = ["arrival_offsets"]


def arrival_offsets(
    count: int, *, request_rate: float, burstiness: float, seed: int
) -> npt.NDArray[np.float64]:
    """Seconds from the start of the run at which each of `count` requests is due, ascending.

    An infinite rate puts all of them at 0. Otherwise the gaps are stretched by one factor so that
    the last request is due at exactly `count / request_rate`: two seeds then offer the same load,
    and only its unevenness differs (as in `vllm bench serve`).

    Raises:
        ConfigError: `request_rate` or `burstiness` is not above 0, or `burstiness` is infinite.
    """
    if not request_rate > 0:
        raise ConfigError(f"the request rate must be above 0 requests/s, got {request_rate:g}")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness must be a finite number above 0, got {burstiness:g}")
    if math.isinf(request_rate) or count == 0:
        return np.zeros(count)
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.gamma(shape=burstiness, scale=1.0 / burstiness, size=count))
    if not times[-1] > 0:  # a shape near 0 draws gaps too small for a float
        raise ConfigError(f"burstiness {burstiness:g} is too close to 0 to draw gaps from")
    return np.asarray(times * (count / request_rate / times[-1]))
