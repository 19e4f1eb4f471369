"""The published loops of block-causal families, and Open-dLLM's `p2`, written anew: one prompt, no
cache, plain Python.

Each takes `forward`, which gives the logits [length, vocab] of a sequence under the model's own
mask, and draws anew after every pass, from the engine's random numbers: the same law, the same
outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn; `noise(number, position, vocab)` gives Gumbel noise [vocab], which
    is another one for each pass."""

    mask: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    noise: Callable[[int, int, int], Tensor] | None = None

    def draw(self, logits: Tensor, number: int, position: int, filtered: bool) -> tuple[int, float]:
        """A candidate and its probability: after temperature and filters, or of the bare logits.

        Args:
            number: of the pass that gave the logits, from 0.
        """
        bare = logits.double()
        if self.temperature == 0:
            token = int(_without(bare, self.mask).argmax())
            return token, float(bare.softmax(-1)[token])
        kept = self._filter(_without(bare / self.temperature, self.mask))
        assert self.noise is not None
        token = int((kept + self.noise(number, position, len(kept))).argmax())
        return token, float((kept if filtered else bare).softmax(-1)[token])

    def _filter(self, logits: Tensor) -> Tensor:
        ranked, order = logits.sort(descending=True)
        if self.top_k:
            ranked[self.top_k :] = -torch.inf
        before = ranked.softmax(-1).cumsum(0) - ranked.softmax(-1)
        ranked[before >= self.top_p] = -torch.inf
        return torch.empty_like(logits).scatter(0, order, ranked)


def _without(logits: Tensor, token: int) -> Tensor:
    return logits.index_fill(0, torch.tensor([token]), -torch.inf)


def _canvas(prompt: list[int], length: int, block: int, mask: int) -> tuple[list[int], list[bool]]:
    total = -(-(len(prompt) + length) // block) * block
    ids = prompt + [mask] * (total - len(prompt))
    return ids, [i >= len(prompt) for i in range(total)]


def _shares(block: int, steps: int) -> list[int]:
    return [block // steps + (t < block % steps) for t in range(steps)]


def _cut(ids: list[int], prompt: int, length: int, eos: int) -> list[int]:
    answer = ids[prompt : prompt + length]
    return answer[: answer.index(eos)] if eos in answer else answer


def llada2_generate(
    forward: Forward,
    prompt: list[int],
    length: int,
    block: int,
    steps: int,
    threshold: float,
    sampling: Sampling,
    eos: int,
) -> list[int]:
    """LLaDA2.0: what is surer than the threshold, or the step's share if that is more."""
    ids, masked = _canvas(prompt, length, block, sampling.mask)
    passes = 0
    for start in range(len(prompt) // block * block, len(ids), block):
        end = start + block
        for share in _shares(block, steps):
            open_ = [i for i in range(start, end) if masked[i]]
            if not open_:
                break
            logits = forward(torch.tensor(ids[:end]))
            drawn = {i: sampling.draw(logits[i], passes, i, filtered=True) for i in open_}
            passes += 1
            chosen = [i for i in open_ if drawn[i][1] > threshold]
            if len(chosen) < share:
                chosen = sorted(open_, key=lambda i: -drawn[i][1])[:share]
            for i in chosen:
                ids[i], masked[i] = drawn[i][0], False
        if eos in ids[len(prompt) : end]:
            break
    return _cut(ids, len(prompt), length, eos)


def llada21_generate(
    forward: Forward,
    prompt: list[int],
    length: int,
    block: int,
    threshold: float,
    edit_threshold: float,
    max_post_steps: int,
    sampling: Sampling,
    eos: int,
) -> tuple[list[int], int]:
    """LLaDA2.1: the same with edits of written tokens; the answer and the number of edits."""
    ids, masked = _canvas(prompt, length, block, sampling.mask)
    edits = passes = 0
    for start in range(len(prompt) // block * block, len(ids), block):
        end, post = start + block, 0
        while True:
            open_ = [i for i in range(start, end) if masked[i]]
            had_masks = bool(open_)
            post += not had_masks
            if post > max_post_steps:
                break
            logits = forward(torch.tensor(ids[:end]))
            answer = range(max(start, len(prompt)), end)
            drawn = {i: sampling.draw(logits[i], passes, i, filtered=True) for i in answer}
            passes += 1
            filled = [i for i in open_ if drawn[i][1] > threshold]
            if open_ and not filled:
                filled = [max(open_, key=lambda i: drawn[i][1])]
            edited = [
                i
                for i in answer
                if not masked[i] and drawn[i][1] > edit_threshold and drawn[i][0] != ids[i]
            ]
            for i in filled + edited:
                ids[i], masked[i] = drawn[i][0], False
            edits += len(edited)
            if not had_masks and not edited:
                break
        if eos in ids[len(prompt) : end]:
            break
    return _cut(ids, len(prompt), length, eos), edits


def p2_generate(
    forward: Forward,
    prompt: list[int],
    length: int,
    block: int,
    steps: int,
    sampling: Sampling,
    eos: int,
) -> tuple[list[int], int]:
    """Open-dLLM's `p2`, block by block; the answer and how often a written token was taken back.

    A step that leaves all of its block masked is no pass: its draws are of no consequence.
    """
    ids, masked = _canvas(prompt, length, 1, sampling.mask)
    taken_back = passes = 0
    for start in range(len(prompt), len(ids), block):
        own = range(start, min(start + block, len(ids)))
        rounds = round(steps * len(own) / length)
        for step in range(rounds):
            left = torch.tensor(float(len(own))) * (1 - (step + 1) / rounds)
            if left.floor() == len(own):
                continue
            logits = forward(torch.tensor(ids))
            drawn = {i: sampling.draw(logits[i], passes, i, filtered=True) for i in own}
            passes += 1
            unsure = sorted(own, key=lambda i: (drawn[i][1], -i))  # of equals, the left one stays
            for rank, i in enumerate(unsure):
                if rank < left.floor():
                    taken_back += not masked[i]
                    ids[i], masked[i] = sampling.mask, True
                elif masked[i]:
                    ids[i], masked[i] = drawn[i][0], False
            if not any(masked[i] for i in own):
                break
        if eos in ids[len(prompt) : own.stop]:
            break
    return _cut(ids, len(prompt), length, eos), taken_back


def sdar_generate(
    forward: Forward,
    prompt: list[int],
    length: int,
    block: int,
    steps: int,
    strategy: str,
    bound: float,
    sampling: Sampling,
    eos: int,
) -> list[int]:
    """SDAR: `dynamic` above a confidence of `bound`, `entropy` below a sum of `bound`.

    Confidence is that of the logits before temperature and filters, as in SDAR's evaluation.
    """
    ids, masked = _canvas(prompt, length, block, sampling.mask)
    passes = 0
    for start in range(len(prompt) // block * block, len(ids), block):
        end, shares = start + block, _shares(block, steps)
        while any(masked[start:end]):
            open_ = [i for i in range(start, end) if masked[i]]
            share = min(shares.pop(0) if shares else 1, len(open_))
            logits = forward(torch.tensor(ids[:end]))
            drawn = {i: sampling.draw(logits[i], passes, i, filtered=False) for i in open_}
            passes += 1
            if strategy == "dynamic":
                chosen = [i for i in open_ if drawn[i][1] > bound]
                if len(chosen) < share:
                    chosen = sorted(open_, key=lambda i: -drawn[i][1])[:share]
            else:
                chosen = _below(bound, {i: _entropy(logits[i]) for i in open_})
            for i in chosen:
                ids[i], masked[i] = drawn[i][0], False
        if eos in ids[len(prompt) : end]:
            break
    return _cut(ids, len(prompt), length, eos)


def _entropy(logits: Tensor) -> float:
    p = logits.double().softmax(-1)
    return -float((p * p.clamp(min=1e-30).log()).sum())


def _below(bound: float, entropies: dict[int, float]) -> list[int]:
    """The surest positions while their entropies sum to less than the bound; at least one."""
    order = sorted(entropies, key=lambda i: entropies[i])
    chosen, total = [order[0]], entropies[order[0]]
    for i in order[1:]:
        total += entropies[i]
        if total >= bound:
            break
        chosen.append(i)
    return chosen
