"""What rows borrow: places in the key-value caches, and prompts that are already there."""

from __future__ import annotations

from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.prefix_cache import PrefixCache
from vdiff_kserve.engine.row import Row


class RowMemory:
    """Lends each row all the cache it will ever need when it is admitted, or nothing.

    Args:
        auxiliary: cache of the model that checks drafts, if there is one.
        prefixes: prompts that earlier rows left in `cache`; None keeps none.
    """

    def __init__(
        self, cache: KVCache, auxiliary: KVCache | None, prefixes: PrefixCache | None
    ) -> None:
        self._cache = cache
        self._auxiliary = auxiliary
        self._prefixes = prefixes

    @property
    def used(self) -> int:
        """Tokens lent to rows."""
        idle = 0 if self._prefixes is None else self._prefixes.idle_tokens
        return self._cache.used - idle

    def reserve(self, row: Row) -> bool:
        """Lend `row` its places, with the beginning of its prompt when that is known."""
        lender = self._cache if self._prefixes is None else self._prefixes
        for _ in range(row.cache_runs):
            offset = lender.reserve(len(row))
            if offset is None:
                self.release(row)
                return False
            row.cache_offsets += (offset,)
        if row.uses_auxiliary and self._auxiliary is not None:
            row.auxiliary_offset = self._auxiliary.reserve(len(row))
            if row.auxiliary_offset is None:
                self.release(row)
                return False
        if self._prefixes is not None and row.shares_prefix:
            row.cached_tokens = self._prefixes.begin(row.cache_offsets[0], row.reusable_prompt)
        return True

    def publish(self, row: Row) -> None:
        """Let later rows find what is final of `row`'s keys and values."""
        if self._prefixes is not None and row.shares_prefix and row.cache_offsets:
            final = row.canvas[: row.final_tokens].tolist()
            self._prefixes.publish(row.cache_offsets[0], final)

    def release(self, row: Row) -> None:
        """Take back everything; nothing happens when `row` has nothing."""
        lender = self._cache if self._prefixes is None else self._prefixes
        for offset in row.cache_offsets:
            lender.release(offset)
        row.cache_offsets = ()
        if row.auxiliary_offset is not None and self._auxiliary is not None:
            self._auxiliary.release(row.auxiliary_offset)
            row.auxiliary_offset = None
