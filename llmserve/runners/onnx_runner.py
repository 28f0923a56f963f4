"""The ONNX runner: an exported graph under the engine, without torch.

Sequences with one token are one call of the graph; one with several, a chunk of a prompt or a row
of guesses, is a call of its own, cut so that its logits stay small. Every sequence has a row of the
cache, which the graph writes in place; rows are moved only when the set of those that decode
changes. Prefixes are not shared: a sequence's keys lie in one piece.

Tokens are drawn by the sampler that every runner shares (docs/sampling.md).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint
from ..durable import verify_manifest
from ..errors import CheckpointError, ConfigError, EngineError
from ..failpoints import hit
from ..layouts import expected_tensors
from ..strict_json import read_json
from .host_sampling import HostSampler
from .huge_pages import collapse_into_huge_pages
from .model_facts import fingerprint_of
from .native_sampling import are_plainly_greedy
from .onnx_cache import GraphCache
from .onnx_rows import RowTable
from .onnx_session import EXPORT_FILE, OnnxGraph
from .protocol import Batch, CacheGroup, IntArray, RunnerInfo, StepResult
from .rounds import run_rounds
from .sampler import prompt_logprobs

__all__ = ["OnnxRunner"]

_log = logging.getLogger("llmserve.engine")

_MAX_CALL_TOKENS = 256
"""Tokens of one call with one sequence: bounds its logits."""

Floats = npt.NDArray[np.float32]


class OnnxRunner:
    """Executes steps of one exported decoder. Implements `Runner`; synchronous."""

    overlaps = False

    def __init__(self, checkpoint: Checkpoint, *, threads: int | None = None) -> None:
        """Load the graph of a model folder: in it, or in its folder `onnx`.

        Args:
            checkpoint: An open model folder.
            threads: Threads for one step; None: ONNX Runtime's choice, one for each core.

        Raises:
            ConfigError: the folder has no graph.
            CheckpointError: the graph cannot be used, or is not one of this model.
            MissingDependencyError: onnxruntime is not installed.
        """
        path = checkpoint.graph
        if path is None:
            raise ConfigError(
                f"{checkpoint.path} holds no ONNX graph: write one with llmserve export onnx, and "
                "give the folder that it names"
            )
        if path.parent != checkpoint.path:
            verify_manifest(path.parent)
        _log.info("the onnx runner shares no prefixes: every sequence computes its own")
        self._graph = OnnxGraph(path, num_threads=threads)
        _check_shape(path, self._graph, checkpoint)
        collapse_into_huge_pages()
        self._sampler = HostSampler()
        self._cache: GraphCache | None = None
        self._rows = RowTable(0, 1)
        self._logits: dict[int, Floats] = {}
        """Packed index → logits [V], of tokens of chunks."""
        self._single: Floats = np.empty((0, 0), np.float32)
        """[B, V], of the tokens that are their sequences' only ones."""
        self._place_of: list[int] = []
        """Packed index of such a token → its place among them."""
        self._is_in_order = False
        """Whether these are the same."""
        self._result: StepResult | None = None
        self.info = _describe(checkpoint, path, self._graph)

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Reserve a row for each block, as long as all of them together or the model's context.

        A quarter of the memory that the blocks stand for is kept when sequences end.

        Raises `ConfigError` where so much address space is not to be had.
        """
        (count,) = num_blocks
        length = min(count * block_size, self.info.max_seq_len)
        kept = count * block_size // 4
        self._cache = self._graph.new_cache(count, length, is_growing=True, num_kept=kept)
        self._rows = RowTable(count, block_size)

    def submit(self, batch: Batch) -> None:
        """Compute one step."""
        if self._cache is None:
            raise EngineError("the runner has no cache yet: call allocate_cache first")
        hit("engine.forward")
        self._forward(batch, self._cache)
        result = StepResult(token_ids=np.empty(0, np.int64))
        if batch.sampling:
            result = self._draw(batch, self._cache)
        for wanted in batch.prompt_rows:
            asked = range(wanted.start, wanted.start + len(wanted.targets))
            entries = prompt_logprobs(self.logits(asked), wanted.targets, wanted.num_top)
            result.prompt_logprobs.append(entries)
        self._result = result

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop graph and cache."""
        self._cache, self._logits, self._place_of = None, {}, []
        del self._graph

    def logits(self, tokens: range) -> Floats:
        """Raw logits [n, V] of tokens of the last step, of those that were asked for. For who
        compares models: a server's never leave the runner."""
        return np.stack([self._logits_at(index) for index in tokens])

    def _forward(self, batch: Batch, cache: GraphCache) -> None:
        """Compute the step's logits: of single tokens all, of chunks those that are asked for."""
        starts = batch.cu_seqlens[:-1]
        num_single = len(starts)
        if num_single < batch.num_tokens:
            num_single = int(np.count_nonzero(np.diff(batch.cu_seqlens) == 1))
        rows = self._rows.place(batch)
        self._rows.lengths[rows] += batch.num_rounds - 1  # room for all of them
        for row in self._rows.released:
            cache.forget(row)
        cache.fit(self._rows.lengths)
        self._logits, self._place_of = {}, []
        if num_single:
            self._run_singles(batch, rows, num_single, cache)
        if num_single == len(starts):
            return
        wanted = set(batch.logits_indices.tolist())
        for prompt in batch.prompt_rows:
            wanted.update(range(prompt.start, prompt.start + len(prompt.targets)))
        for sequence in range(num_single, len(starts)):
            tokens = slice(int(starts[sequence]), int(batch.cu_seqlens[sequence + 1]))
            self._logits |= self._run_one(batch, tokens, rows[sequence], wanted, cache)

    def _draw(self, batch: Batch, cache: GraphCache) -> StepResult:
        """The tokens of a step whose first round has its logits."""

        def draw(drawn: list[IntArray]) -> StepResult:
            if ahead := len(drawn):  # the same rows of the cache, a token further
                lengths = batch.context_lens + ahead
                self._call_singles(drawn[-1], batch.positions + ahead, lengths, cache)
            logits = self._asked(batch.logits_indices)
            return self._sampler.sample(logits, batch.sampling, drawn)

        if batch.num_rounds == 1:
            return draw([])
        if self._is_in_order and are_plainly_greedy(batch.sampling):
            rounds = self._graph.likeliest_rounds(batch.context_lens, batch.num_rounds)
            return run_rounds(lambda _: _likeliest(*next(rounds)), batch)
        return run_rounds(draw, batch)

    def _logits_at(self, index: int) -> Floats:
        if index < len(self._place_of):
            row: Floats = self._single[self._place_of[index]]
            return row
        return self._logits[index]

    def _asked(self, indices: IntArray) -> Floats:
        """Logits [R, V] of the tokens asked for; not copied where they are all, in their order."""
        if not self._logits and self._is_in_order and len(indices) == len(self._place_of):
            return self._single
        return np.stack([self._logits_at(index) for index in indices.tolist()])

    def _run_singles(self, batch: Batch, rows: list[int], count: int, cache: GraphCache) -> None:
        """The first `count` sequences, with one token each, in one call."""
        self._gather(rows, count, cache)
        self._place_of = rows[:count]
        self._is_in_order = self._place_of == list(range(count))
        ids, positions = batch.token_ids[:count], batch.positions[:count]
        self._call_singles(ids, positions, batch.context_lens[:count], cache)

    def _call_singles(
        self, ids: IntArray, positions: IntArray, lengths: IntArray, cache: GraphCache
    ) -> None:
        """One token of each sequence that has a place, [B] by sequence."""
        if not self._is_in_order:
            order = np.argsort(self._place_of)
            ids, positions, lengths = ids[order], positions[order], lengths[order]
        self._single = self._graph.run(cache, 0, ids[:, None], positions[:, None], lengths)[:, 0]

    def _gather(self, rows: list[int], count: int, cache: GraphCache) -> None:
        """Put the first `count` sequences in the first rows; `rows` is changed where they moved."""
        if max(rows[:count]) < count:
            return
        for row, other in self._rows.misplaced(rows[:count]):
            lengths = self._rows.lengths
            if lengths[other]:
                cache.swap(row, other, int(max(lengths[row], lengths[other])))
            else:
                cache.move(row, other, int(lengths[row]))
                cache.forget(row)
            self._rows.exchange(row, other)
            moved = {row: other, other: row}
            rows[:] = [moved.get(one, one) for one in rows]

    def _run_one(
        self, batch: Batch, tokens: slice, row: int, wanted: set[int], cache: GraphCache
    ) -> dict[int, Floats]:
        """A sequence with several tokens, in calls of bounded size."""
        logits: dict[int, Floats] = {}
        for start in range(tokens.start, tokens.stop, _MAX_CALL_TOKENS):
            part = slice(start, min(start + _MAX_CALL_TOKENS, tokens.stop))
            positions = batch.positions[part]
            found = self._graph.run(
                cache, row, batch.token_ids[None, part], positions[None], positions[-1:] + 1
            )[0]
            logits |= {
                index: found[index - part.start].copy()
                for index in range(part.start, part.stop)
                if index in wanted
            }
        return logits


def _likeliest(token_ids: IntArray, logits: Floats) -> StepResult:
    """A round's ids [B] by the logits [B] that made them the likeliest."""
    is_finite = np.isfinite(logits)  # NaN wins a search for the largest, so this tells
    return StepResult(token_ids=token_ids, is_finite=None if is_finite.all() else is_finite)


def _check_shape(path: Path, graph: OnnxGraph, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` unless the graph is one of the model that `config.json` describes."""
    config = checkpoint.config
    found = (graph.num_layers, graph.num_kv_heads, graph.vocab_size)
    expected = (config.num_layers, config.num_kv_heads, config.vocab_size)
    if found != expected:
        raise CheckpointError(
            f"{path}: layers, key heads and vocabulary are {found}; config.json says {expected}"
        )


def _describe(checkpoint: Checkpoint, path: Path, graph: OnnxGraph) -> RunnerInfo:
    config = checkpoint.config
    facts = path.with_name(EXPORT_FILE)
    form = str(read_json(facts).get("form", "unknown form")) if facts.is_file() else "unknown form"
    token_bytes = 2 * 4 * graph.num_kv_heads * graph.head_dim * graph.num_layers
    return RunnerInfo(
        vocab_size=config.vocab_size,
        max_seq_len=config.max_seq_len,
        eos_token_ids=config.eos_token_ids,
        cache_groups=(
            CacheGroup(num_layers=graph.num_layers, window=None, bytes_per_token=token_bytes),
        ),
        runner="onnx",
        executed_form=f"{form} (ONNX Runtime)",
        cache_dtype="float32",
        num_parameters=sum(int(np.prod(shape)) for shape in expected_tensors(config).values()),
        weight_bytes=sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        fingerprint=fingerprint_of(checkpoint, ()),
        repeats_decodes=True,
        shares_blocks=False,
    )
