"""Decode steps as CUDA graphs: captured when a bucket is first met, replayed from then on.

At one token for each sequence a model is hundreds of small kernels, and starting them takes the
host longer than running them takes the device. A graph starts them all at once. Everything but
capture and replay itself is `torch_static_step.py`, which runs without a GPU, too.

Shapes: B sequences of a bucket, T of them real, E hidden_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model.scores import Scores
from ..model.transformer import Transformer
from .protocol import Batch
from .torch_cache import PagedCache
from .torch_forward import Forward
from .torch_static_step import StaticInputs, StepShape
from .torch_triton_attention import SPAN

__all__ = ["CudaGraphs", "Graph", "GraphedForward"]

_log = logging.getLogger("llmserve.engine")


class Graph(Protocol):
    """A step that was captured."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """Run `step` once and record it; where its result will be after each replay."""

    def replay(self) -> None:
        """Run it again, over what its inputs hold now."""


class CudaGraphs:
    """Makes graphs that share the memory of what they compute on the way."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> Graph:
        """An empty graph."""
        return _CudaGraph(self._pool)


class _CudaGraph:
    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        # Once before, on a stream of its own: kernels are compiled and libraries make their
        # workspaces, which must not happen while a graph is recorded.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph, pool=self._pool):
            out = step()
        return out

    def replay(self) -> None:
        self._graph.replay()


class GraphedForward:
    """Replays plain decodes and leaves every other step to another forward. Implements `Forward`.

    A bucket that cannot be captured, for want of memory above all, is the last one tried: a line in
    the log says so, and all steps are computed as they are without graphs.
    """

    def __init__(
        self, model: Transformer, ordinary: Forward, make_graph: Callable[[], Graph]
    ) -> None:
        """`ordinary` is over the same model."""
        self._model, self._ordinary = model, ordinary
        self._scores = Scores.of(model.config)
        self._make_graph: Callable[[], Graph] | None = make_graph
        self._steps: dict[StepShape, _CapturedStep] = {}

    def hidden(self, batch: Batch, cache: PagedCache, fed: Tensor | None = None) -> Tensor:
        """See `Forward`. What is returned for a decode holds until the next one."""
        shape = StepShape.of(batch)
        if shape is None:
            return self._ordinary.hidden(batch, cache, fed)
        if shape not in self._steps:
            self.capture(shape, cache)
        step = self._steps.get(shape)
        if step is None:
            return self._ordinary.hidden(batch, cache, fed)
        return step.run(batch, fed)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward`."""
        return self._ordinary.logits(hidden)

    def check(self) -> None:
        """See `Forward`. What was captured is dropped: it reads the cache that was there."""
        self._steps.clear()
        self._ordinary.check()

    def capture(self, shape: StepShape, cache: PagedCache) -> None:
        """Capture the steps of a shape, with nothing but padding: no block is touched."""
        if self._make_graph is None:
            return
        try:
            self._steps[shape] = _CapturedStep(
                self._model, self._scores, shape, cache, self._make_graph()
            )
        except RuntimeError as error:  # of torch and CUDA, out of memory among them
            self._make_graph = None
            _log.warning("no more decode steps are captured as CUDA graphs: %s", error)
        else:
            rows, tokens = shape.num_rows, shape.num_spans * SPAN
            _log.info("captured the decode of up to %d sequences of up to %d tokens", rows, tokens)


class _CapturedStep:
    """One bucket's graph and its inputs."""

    def __init__(
        self, model: Transformer, scores: Scores, shape: StepShape, cache: PagedCache, graph: Graph
    ) -> None:
        """Capture a step of nothing but padding."""
        self._inputs = inputs = StaticInputs(shape, cache)
        attend = inputs.attention(scores)
        self._graph = graph
        self._hidden = graph.capture(
            lambda: model.hidden(inputs.token_ids, inputs.positions, attend)
        )

    def run(self, batch: Batch, fed: Tensor | None) -> Tensor:
        """The final hidden states of a batch of this shape, [T, E]."""
        self._inputs.write(batch)
        if fed is not None:
            self._inputs.token_ids[: len(fed)] = fed
        self._graph.replay()
        return self._hidden[: batch.num_tokens]
