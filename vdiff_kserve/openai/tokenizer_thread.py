"""Long texts are tokenized beside the asyncio loop."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

Result = TypeVar("Result")


class TokenizerThread:
    """A thread with a tokenizer of its own: a long text takes seconds, in which the loop goes on,
    and a tokenizer serves one thread at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vdiff-tokenizer")

    async def run(self, work: Callable[[PreTrainedTokenizerFast], Result]) -> Result:
        """What `work` makes of the thread's tokenizer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self._tokenizer)
