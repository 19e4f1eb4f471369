"""Which replica a request runs on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import ceil

from vdiff_kserve.engine import GenerationRequest, block_hashes
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.sampler import SCHEDULED_POLICIES

TOKENS_PER_STEP = 3
"""Tokens that a step commits where the model's confidence decides, as a guess."""
REMEMBERED_PREFIXES = 4096
"""Beginnings of prompts that are remembered of one replica."""


def denoising_work(request: GenerationRequest, spec: ModelSpec) -> int:
    """Tokens that the forward passes of a request will run over, as far as that can be told before.

    A canvas of `c` tokens whose answer has `b` blocks and takes `s` steps costs `s * c` without a
    cache; with one, a pass over the canvas for each block and short ones for the other steps. A
    request that scores takes a pass over its prompt for each probe.
    """
    params = request.decoding
    prompt, answer = len(request.prompt_ids), request.max_tokens
    if request.scoring is not None:
        first, end = request.scoring.probes
        return (end - first) * prompt
    canvas, block = prompt + answer, min(params.block_length, answer)
    blocks = ceil(answer / block)
    if params.policy in SCHEDULED_POLICIES or params.policy == "p2":
        steps = params.steps or answer
    else:
        steps = ceil(answer / TOKENS_PER_STEP)
    steps = max(steps, blocks)
    if params.cache == "none":
        work = steps * canvas
    elif spec.block_causal:
        work = prompt + (steps + blocks) * block
    else:
        reused = block if params.cache == "dual" else block + answer // 2
        work = blocks * canvas + (steps - blocks) * (reused + 2 * params.vicinity)
    return work * (2 if params.cfg_scale > 0 else 1)


def prompt_prefixes(request: GenerationRequest, spec: ModelSpec) -> tuple[bytes, ...]:
    """Hashes of the prompt's whole blocks, each with all before it; of models that reuse them."""
    if not spec.block_causal or request.decoding.cache == "none":
        return ()
    return tuple(block_hashes(request.prompt_ids, spec.block_length))


class PrefixMemory:
    """Beginnings of prompts that a replica has seen, and so probably has in its prefix cache."""

    def __init__(self, limit: int = REMEMBERED_PREFIXES) -> None:
        self._limit = limit
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def add(self, prefixes: Iterable[bytes]) -> None:
        """The replica computes these."""
        for each in prefixes:
            self._known[each] = None
            self._known.move_to_end(each)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)

    def blocks_known(self, prefixes: Sequence[bytes]) -> int:
        """Whole blocks of a prompt that need not be computed."""
        count = 0
        for each in prefixes:
            if each not in self._known:
                break
            count += 1
        return count
