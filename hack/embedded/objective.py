"""From examples to training batches: chat rows filled with end tokens, and the masks on them."""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hack.embedded import tasks
from hack.embedded.example import Example
from hack.embedded.tokenizer import BOS, EOS, EOT, MASK, chat_message, chat_prompt

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Be brief.",
    "You are llada, a tiny model.",
)
SYSTEM_SHARE = 0.05
RAW_SHARE = 0.03
DRILL_SHARE = 0.15
DRILLS = (
    # facts, how many in a row, odds
    (tasks.digit_facts, 14, 0.15),
    (tasks.sort_facts, 6, 0.2),
    (tasks.spelling_facts, 10, 0.25),
    (tasks.count_facts, 5, 0.25),
    (tasks.sequence_facts, 5, 0.15),
)
DRILL_PROMPT = "Drill."
LONG_SHARE = 0.05
UNIFORM_SHARE = 0.15
FRONTIER_SHARE = 0.65  # blocks whose written tokens lie mostly on the left, as decoding leaves them
MOST_KNOWN = 0.6  # largest share of the results that a drill leaves in sight
MOST_AHEAD = 0.4  # largest share of written tokens right of such a frontier
BLOCK_LENGTHS = (32, 64, 16, 8, 512)
BLOCK_LENGTH_ODDS = (0.62, 0.12, 0.12, 0.06, 0.08)
TIGHT_SHARE = 0.2
MOST_FILL = 280
CUT_SHARE = 0.1  # batches whose canvas ends early, as with a small max_tokens or lookahead
LEAST_CUT, LONGEST_CUT = 16, 48
FILL_KEPT = 4  # end tokens after the answer that always count
FILL_SHARE = 0.04  # share of the others that count
RIGHT_OF_BLOCK_WEIGHT = 0.15
POOL = 768


@dataclass(frozen=True)
class Row:
    """One chat as token ids: `prompt` is never masked; `answer` ends with the end-of-turn token.

    `only`, where not empty, are the places in the answer that may be masked.
    """

    task: str
    prompt: list[int]
    answer: list[int]
    suffix: list[int]
    only: frozenset[int] = frozenset()

    @property
    def length(self) -> int:
        """Tokens without fill, one end token included."""
        return len(self.prompt) + len(self.answer) + 1 + len(self.suffix)


@dataclass(frozen=True)
class Batch:
    """Rows of one length with masks, and the positions that count in the loss.

    Attributes:
        canvas: int64 [rows, length], mask tokens in place.
        selected: int64 [positions], flat indices of the masked positions that count.
        targets: int64 [positions], their tokens.
        weights: float32 [positions].
        rows: int64 [positions], the row of each position.
        tasks: the task of each row.
    """

    canvas: Tensor
    selected: Tensor
    targets: Tensor
    weights: Tensor
    rows: Tensor
    tasks: tuple[str, ...]


class RowEncoder:
    """Tokenizes examples as chats; a few get a system message, a few become plain text to infill."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.eot = tokenizer.token_to_id(EOT)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, example: Example) -> Row:
        """The example under the chat template."""
        prompt = chat_prompt(example.prompt)
        if self.rng.random() < SYSTEM_SHARE:
            system = chat_message("system", self.rng.choice(SYSTEM_PROMPTS))
            prompt = BOS + system + prompt.removeprefix(BOS)
        answer = [*self._ids(example.answer), self.eot]
        return Row(example.task, self._ids(prompt), answer, [])

    def raw(self, example: Example) -> Row:
        """The answer as plain text with a span missing: an infilling or completion request."""
        ids = self._ids(example.answer)
        start = self.rng.randrange(max(1, len(ids) - 1))
        stop = len(ids) if self.rng.random() < 0.5 else self.rng.randint(start + 1, len(ids))
        return Row("raw", ids[:start], ids[start:stop], ids[stop:])

    def drill(self) -> Row:
        """Many small facts with only their results masked: practice, densely."""
        kind, count, _ = self.rng.choices(DRILLS, [odds for *_, odds in DRILLS])[0]
        answer: list[int] = []
        only: list[int] = []
        for fact, result in islice(kind(self.rng), count):
            answer += self._ids(fact)
            ids = self._ids(result)
            only += range(len(answer), len(answer) + len(ids))
            answer += ids + self._ids("; ")
        return Row("drill", self._ids(chat_prompt(DRILL_PROMPT)), answer, [], frozenset(only))

    def encode(self, example: Example) -> Row:
        """One training row."""
        if self.rng.random() < DRILL_SHARE:
            return self.drill()
        plain = example.task in ("topic", "story", "fill_middle", "capitals", "days", "months")
        if plain and self.rng.random() < 4 * RAW_SHARE:
            return self.raw(example)
        return self.chat(example)


def _mask_row(rng: random.Random, row: Row, length: int) -> tuple[list[float], int, int]:
    """Chances of each position of the answer part to be masked, and the active block.

    Returns:
        chance per position of [prompt end, length - suffix), and the block's bounds there.
    """
    size = length - len(row.prompt) - len(row.suffix)
    if row.only:
        ratio = 1.0 - MOST_KNOWN * rng.random() ** 2
        chances = [ratio * (i in row.only) for i in range(size)]
        return chances, 0, min(size, len(row.answer))
    ratio = 1.0 - rng.random()
    if rng.random() < UNIFORM_SHARE:
        return [ratio] * size, 0, size
    block = rng.choices(BLOCK_LENGTHS, BLOCK_LENGTH_ODDS)[0]
    reach = size if rng.random() < 0.08 else min(size, len(row.answer) + 1)
    start = rng.randrange((reach + block - 1) // block) * block
    stop = min(size, start + block)
    frontier = start
    if rng.random() < FRONTIER_SHARE:
        frontier = rng.randrange(start, stop)
        ratio = 1.0 - MOST_AHEAD * rng.random() ** 2
    chances = [0.0] * frontier + [ratio] * (stop - frontier) + [1.0] * (size - stop)
    return chances, start, stop


def make_batch(rng: random.Random, rows: list[Row], length: int, mask_id: int, eos: int) -> Batch:
    """Fill every row with end tokens to `length`, mask it, and weigh the masked positions."""
    canvases, selected, targets, weights, owners = [], [], [], [], []
    for index, row in enumerate(rows):
        first = len(row.prompt)
        size = length - first - len(row.suffix)
        middle = (row.answer + [eos] * size)[:size]
        chances, start, stop = _mask_row(rng, row, length)
        masked = [i for i, chance in enumerate(chances) if chance and rng.random() < chance]
        if not any(start <= i < stop for i in masked):
            masked.append(rng.randrange(start, max(stop, start + 1)))
        canvas = list(middle)
        for i in masked:
            canvas[i] = mask_id
            if i >= len(row.answer) + FILL_KEPT and rng.random() > FILL_SHARE:
                continue
            selected.append(index * length + first + i)
            targets.append(middle[i])
            weights.append(1.0 if start <= i < stop else RIGHT_OF_BLOCK_WEIGHT)
            owners.append(index)
        canvases.append(row.prompt + canvas + row.suffix)
    return Batch(
        torch.tensor(canvases),
        torch.tensor(selected),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(owners),
        tuple(row.task for row in rows),
    )


def batches(
    examples: Iterable[Example], tokenizer: Tokenizer, rng: random.Random, budget: int, longest: int
) -> Iterator[Batch]:
    """Batches of about `budget` tokens; rows of similar length together, some batches much longer."""
    encoder = RowEncoder(tokenizer, rng)
    mask_id, eos = tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS)
    stream = iter(examples)
    while True:
        rows = [encoder.encode(next(stream)) for _ in range(POOL)]
        pool = [(min(longest, row.length + _fill(rng)), row) for row in rows]
        pool.sort(key=lambda item: item[0])
        groups: list[tuple[list[Row], int]] = []
        while pool:
            length = pool[-1][0]
            if rng.random() < LONG_SHARE:
                length = rng.randint(length, longest)
            count = max(1, budget // length)
            group = [row for _, row in pool[-count:]]
            del pool[-count:]
            if rng.random() < CUT_SHARE:
                least = max(len(row.prompt) + len(row.suffix) + LEAST_CUT for row in group)
                length = max(min(length, least), length - rng.randint(1, LONGEST_CUT))
            if len(group) * length > budget // 3:
                groups.append((group, length))
        rng.shuffle(groups)
        for group, length in groups:
            yield make_batch(rng, group, length, mask_id, eos)


def _fill(rng: random.Random) -> int:
    """End tokens after an answer: a few, or up to `MOST_FILL`, each magnitude as often.

    Drawn without regard to the answer: were canvases tight, the model would read the answer's length
    from the canvas and run on to its end when `max_tokens` is large.
    """
    if rng.random() < TIGHT_SHARE:
        return rng.randint(0, 8)
    return round(math.exp(rng.uniform(math.log(4), math.log(MOST_FILL))))
