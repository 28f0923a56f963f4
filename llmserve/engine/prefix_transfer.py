"""A prompt's blocks as bytes, out of one engine's prefix cache and into another's.

The prefix cache names blocks by their content (`block_keys.py`), so an engine of the same model can
take another's blocks in under the names that it would have given them itself. What is taken in is
a hit like any other, what is not is computed again: no token depends on it. The bytes are the key
of the last block, then of each cache group its blocks, layer by layer; of a group with a window
those that a later token still sees.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, EngineError
from ..runners.protocol import CacheReader, Runner
from .block_keys import BlockKeys, root_key
from .config import EngineConfig
from .kv_cache import GroupCache, KVCache
from .request import Request

__all__ = ["KEY_BYTES", "ByteArray", "PrefixTransfer", "shared_area", "transfer_bytes"]

ByteArray = npt.NDArray[np.uint8]

KEY_BYTES = 32
"""Bytes of a block's key."""


def transfer_bytes(num_blocks: int, block_bytes: int) -> int:
    """Bytes that hold `num_blocks` blocks of all groups, `block_bytes` each, at most."""
    return KEY_BYTES + num_blocks * block_bytes


def shared_area(num_bytes: int) -> ByteArray:
    """Memory that all processes have which are forked afterwards.

    It has no file and no name, ends with the last of them, and is resident only where something
    was written.
    """
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


class PrefixTransfer:
    """Reads and writes the prefix cache of one engine, between two of its steps."""

    def __init__(self, runner: Runner, kv: KVCache, config: EngineConfig) -> None:
        """`kv` is the engine's own.

        Raises:
            ConfigError: the runner does not let its cache be read, or there is no prefix cache.
        """
        if not isinstance(runner, CacheReader):
            raise ConfigError(
                f"the {runner.info.runner} runner cannot hand KV blocks to another engine: use "
                "the native runner, or no engines for prompts alone"
            )
        if not (config.has_prefix_cache and runner.info.shares_blocks):
            raise ConfigError(
                "KV blocks are handed over through the prefix cache, and this engine has none"
            )
        self._fingerprint = runner.info.fingerprint
        self._views = runner.cache_blocks()
        self._kv = kv
        self._block_size = config.block_size

    def read(self, request: Request, out: ByteArray) -> int:
        """Copy what the cache holds of the beginning of a prompt.

        Args:
            request: Whose prompt.
            out: Where to, at least `transfer_bytes` of the prompt's full blocks.

        Returns:
            Full blocks of the prompt that the bytes stand for; 0: none, nothing was written.

        Raises:
            EngineError: `out` is too small.
        """
        keys = self._keys(request, len(request.prompt_token_ids) // self._block_size)
        num_blocks = self._kv.longest(keys, len(keys) * self._block_size)
        blocks = [
            [group.pool.find(key) for key in self._visible(group, keys[:num_blocks])]
            for group in self._kv.groups
        ]
        if not num_blocks or any(None in found for found in blocks):  # evicted meanwhile
            return 0
        size = KEY_BYTES + sum(
            len(found) * view.shape[1]
            for found, views in zip(blocks, self._views, strict=True)
            for view in views
        )
        if size > len(out):
            raise EngineError(f"{size} bytes of KV blocks are above the {len(out)} given")
        out[:KEY_BYTES] = np.frombuffer(keys[num_blocks - 1], np.uint8)
        start = KEY_BYTES
        for found, views in zip(blocks, self._views, strict=True):
            indices = np.array(found, dtype=np.int64)
            for view in views:
                stop = start + len(indices) * view.shape[1]
                rows = out[start:stop].reshape(len(indices), view.shape[1])
                view.take(indices, axis=0, out=rows, mode="clip")  # "raise" would copy twice
                start = stop
        return num_blocks

    def write(self, request: Request, num_blocks: int, data: ByteArray) -> int:
        """Take the first `num_blocks` blocks of a prompt into the prefix cache.

        Args:
            request: Whose prompt.
            num_blocks: What `read` returned, in the other engine.
            data: What it wrote.

        Returns:
            Blocks that were not there before, all groups together; 0 also where the pools have
            no room.

        Raises:
            EngineError: the bytes are not of this prompt.
        """
        keys = self._keys(request, num_blocks)
        if len(keys) < num_blocks or not num_blocks or data[:KEY_BYTES].tobytes() != keys[-1]:
            raise EngineError("KV blocks of another prompt were handed over")
        held = [self._hold(group, keys) for group in self._kv.groups]
        if any(one is None for one in held):
            for group, one in zip(self._kv.groups, held, strict=True):
                group.pool.free([] if one is None else one[0])
            return 0
        num_written, start = 0, KEY_BYTES
        for group, one, views in zip(self._kv.groups, held, self._views, strict=True):
            assert one is not None, "a group without room"
            blocks, is_new = one
            for view in views:
                stop = start + len(blocks) * view.shape[1]
                rows = data[start:stop].reshape(len(blocks), view.shape[1])
                view[np.array(blocks)[is_new]] = rows[is_new]
                start = stop
            for block_id, key in zip(blocks, self._visible(group, keys), strict=True):
                group.pool.seal(block_id, key)
            group.pool.free(blocks)
            num_written += int(is_new.sum())
        return num_written

    def _hold(
        self, group: GroupCache, keys: list[bytes]
    ) -> tuple[list[int], npt.NDArray[np.bool_]] | None:
        """Hold the blocks of `keys`, new ones where they are not there, and which those are."""
        found = [group.pool.find(key) for key in self._visible(group, keys)]
        there = [block_id for block_id in found if block_id is not None]
        for block_id in there:  # before anything is allocated, which may evict
            group.pool.share(block_id)
        num_new = len(found) - len(there)
        if group.pool.num_free < num_new:
            group.pool.free(there)
            return None
        new: Iterator[int] = iter(group.pool.allocate(num_new))
        blocks = [next(new) if block_id is None else block_id for block_id in found]
        return blocks, np.array([block_id is None for block_id in found], dtype=np.bool_)

    def _visible(self, group: GroupCache, keys: list[bytes]) -> list[bytes]:
        """Those of a beginning's `keys` whose blocks the token after it may see."""
        return keys[group.first_visible(max(0, len(keys) * self._block_size - 1)) :]

    def _keys(self, request: Request, count: int) -> list[bytes]:
        count = min(count, len(request.prompt_token_ids) // self._block_size)
        root = root_key(self._fingerprint, request)
        chain = BlockKeys(root, request, request.prompt_token_ids, self._block_size)
        return chain.full(count)[:count]
