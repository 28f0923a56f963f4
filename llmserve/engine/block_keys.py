"""Names for the content of KV blocks: equal keys mean equal keys and values.

What a block holds depends on its tokens and on all before them, on the model, the adapter and
nothing else. So its key is a sha256 chain: root(model, adapter, salt), then one link for each
block. The salt keeps tenants apart: who does not know it cannot find, by timing, what others
asked. sha256, and not a fast hash, because whoever finds a collision reads another's prompt.

A prompt that ends within a block gets a link for that end, too: the same prompt again needs its
last token computed, nothing more.
"""

from __future__ import annotations

import hashlib
from array import array

from .request import Request

__all__ = ["BlockKeys", "root_key"]


def root_key(fingerprint: str, request: Request, *, is_private: bool = False) -> bytes:
    """Where the chain of a request begins; a private one is shared by its own choices alone."""
    private = request.request_id if is_private else ""
    digest = hashlib.sha256(b"llmserve kv 1")
    for part in (fingerprint, request.adapter or "", request.cache_salt, private):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    # An adapter named "" and none at all are told apart.
    digest.update(b"adapter" if request.adapter is not None else b"base")
    return digest.digest()


class BlockKeys:
    """Keys of one sequence's blocks, made as far as they are asked for."""

    def __init__(self, root: bytes, request: Request, token_ids: list[int], block_size: int):
        """`token_ids` is the sequence's live list, which only grows."""
        self._root = root
        self._request = request
        self._token_ids = token_ids
        self._block_size = block_size
        self._keys: list[bytes] = []

    def full(self, count: int) -> list[bytes]:
        """Keys of the blocks 0..count - 1, all full. O(blocks not asked for before)."""
        while len(self._keys) < count:
            index = len(self._keys)
            parent = self._keys[-1] if self._keys else self._root
            start = index * self._block_size
            stop = start + self._block_size
            self._keys.append(self._link(parent, index, start, stop))
        return self._keys

    def prompt_end(self) -> bytes | None:
        """Key of the prompt's last block where the prompt ends within it, else None."""
        num_prompt_tokens = len(self._request.prompt_token_ids)
        count, rest = divmod(num_prompt_tokens, self._block_size)
        if not rest:
            return None
        keys = self.full(count)
        parent = keys[count - 1] if count else self._root
        return self._link(parent, count, num_prompt_tokens - rest, num_prompt_tokens)

    def _link(self, parent: bytes, index: int, start: int, stop: int) -> bytes:
        given = self._request.block_keys
        if given is not None and stop <= len(self._request.prompt_token_ids):
            # The trace's own name for the block stands for all that comes before it.
            return hashlib.sha256(
                self._root + b"named" + given[index].to_bytes(16, "little")
            ).digest()
        tokens = array("q", self._token_ids[start:stop])
        return hashlib.sha256(parent + tokens.tobytes()).digest()
