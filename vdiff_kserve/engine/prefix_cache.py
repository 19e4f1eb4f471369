"""Keys and values that one request leaves to the next: prompts that begin alike."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from vdiff_kserve.engine.kv_cache import KVCache


def block_hashes(token_ids: Sequence[int], block_length: int) -> list[bytes]:
    """One hash for each whole block, of that block and all before it."""
    chain = blake2b(digest_size=16)
    hashes = []
    for end in range(block_length, len(token_ids) + 1, block_length):
        chain.update(array("q", token_ids[end - block_length : end]).tobytes())
        hashes.append(chain.copy().digest())
    return hashes


class PrefixCache:
    """Runs of a `KVCache` whose first blocks are known by what they hold.

    Only for block-causal models: there a token sees nothing right of its block, so the keys and
    values of a finished block are the same in every canvas that begins with the same tokens. A row
    that begins like a known run starts from a copy of it, which costs a memory copy instead of a
    forward pass. A run stays when its row is gone, until the memory is needed; the one that was of
    no use for the longest time goes first.
    """

    def __init__(self, cache: KVCache, block_length: int) -> None:
        self._cache = cache
        self._block_length = block_length
        self._holder: dict[bytes, int] = {}  # a block's hash -> the run that holds it
        self._hashes: dict[int, list[bytes]] = {}  # a run -> its blocks' hashes
        self._idle: OrderedDict[int, int] = (
            OrderedDict()
        )  # a run without row -> tokens, oldest first

    @property
    def idle_tokens(self) -> int:
        """Places held by runs whose rows are gone."""
        return sum(self._idle.values())

    def reserve(self, tokens: int) -> int | None:
        """As `KVCache.reserve`; idle runs make room when there is none."""
        while (offset := self._cache.reserve(tokens)) is None:
            if not self._idle:
                return None
            self._drop(next(iter(self._idle)))
        return offset

    def begin(self, offset: int, prompt_ids: Sequence[int]) -> int:
        """Copy what is known of a prompt to the run at `offset`.

        The block that holds the first token to generate is never part of it.

        Returns:
            tokens copied, whole blocks.
        """
        blocks = 0
        for found in block_hashes(prompt_ids, self._block_length):
            if found not in self._holder:
                break
            blocks, last = blocks + 1, found
        if not blocks:
            return 0
        source = self._holder[last]
        if source in self._idle:
            self._idle.move_to_end(source)
        tokens = blocks * self._block_length
        self._cache.copy(source, offset, tokens)
        return tokens

    def publish(self, offset: int, token_ids: Sequence[int]) -> None:
        """Make known that the run at `offset` holds the final keys and values of `token_ids`."""
        hashes = block_hashes(token_ids, self._block_length)
        self._hashes[offset] = hashes
        replaced = {self._holder[h] for h in hashes if h in self._holder} - {offset}
        self._holder.update(dict.fromkeys(hashes, offset))
        for run in replaced & self._idle.keys():
            if not self._is_found(run):
                self._drop(run)

    def release(self, offset: int) -> None:
        """The run's row is gone: keep what is known of it, give back the rest."""
        if not self._is_found(offset):
            self._forget(offset)
            self._cache.release(offset)
            return
        self._idle[offset] = self._block_length * len(self._hashes[offset])
        self._cache.shrink(offset, self._idle[offset])

    def clear(self) -> None:
        """Give back every idle run."""
        for offset in list(self._idle):
            self._drop(offset)

    def _is_found(self, offset: int) -> bool:
        """Whether a row that begins alike would be sent to this run: not where others that hold the
        same blocks were made known later, be they there still or not."""
        hashes = self._hashes.get(offset, ())
        return any(self._holder.get(known) == offset for known in hashes)

    def _drop(self, offset: int) -> None:
        del self._idle[offset]
        self._forget(offset)
        self._cache.release(offset)

    def _forget(self, offset: int) -> None:
        for known in self._hashes.pop(offset, ()):
            if self._holder.get(known) == offset:
                del self._holder[known]
