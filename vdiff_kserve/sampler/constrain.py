"""What a request asks of its tokens: bans, biases, penalties.

The rules and their order are vLLM's (`vllm/v1/sample`): only allowed tokens, no bad word, no early
end token, logit bias, then the repetition, frequency and presence penalties. There they see a text
that grows at its right end; here, many positions are written at once and in any order, so

- what is committed when the step begins is what counts, tokens right of it included, but for end
  tokens and what stands behind the first of them, which is no part of the answer. A written
  position that may be edited does not count for itself;
- a bad word is banned at every position where that token would complete it, and of the positions
  that would complete one together in one step, the rightmost waits (`hold_back`).

Tables are made for the rows that ask; the others cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.sampler.penalties import Penalties, penalize
from vdiff_kserve.sampler.step import AllowedTokens, StepRows
from vdiff_kserve.sampler.token_rules import ConstrainedRow, slots_of


@dataclass(frozen=True)
class Biases:
    """The rules of a step's rows that have some for every token.

    Attributes:
        has: which rows of the step these are.
        slot: int64 [rows of the step], where a row's are in the table; 0 for the others.
        table: float32 [slots, vocab].
    """

    has: Sequence[bool]
    slot: Tensor
    table: Tensor

    @classmethod
    def of(cls, rows: Sequence[ConstrainedRow], num_rows: int) -> Biases | None:
        """The table of a step; None when no row has such rules."""
        found = {row.row: row.rules.bias for row in rows if row.rules.bias is not None}
        if not found:
            return None
        table = torch.stack(list(found.values()))
        return cls([i in found for i in range(num_rows)], slots_of(found, num_rows, table), table)


@dataclass(frozen=True)
class ConstraintTable:
    """The constraints of a step's rows, side by side.

    Attributes:
        rows: those that ask for something.
        biases: of the rows that have some.
        penalties: of the rows that have any.
        banned: int64 [3, n], (row, canvas position, token), sorted by row and position.
    """

    rows: Sequence[ConstrainedRow]
    biases: Biases | None
    penalties: Penalties | None
    banned: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[ConstrainedRow], num_rows: int, device: torch.device
    ) -> ConstraintTable | None:
        """The tables of a step; None when no row asks for anything."""
        if not rows:
            return None
        banned = torch.cat([_early_ends(row) for row in rows] + [_word_ends(row) for row in rows])
        return cls(
            rows=rows,
            biases=Biases.of(rows, num_rows),
            penalties=Penalties.of(rows, num_rows, device),
            banned=to_device(banned.T.contiguous(), device),
        )


def constrain(logits: Tensor, rows: StepRows) -> Tensor:
    """The logits as the rows' constraints, and then their grammars, leave them.

    Args:
        logits: [positions, vocab]; those of rows that ask for something are overwritten. A
            vocabulary shorter than the tables', as an auxiliary model's may be, is fine.
    """
    if len(logits) == 0:
        return logits
    if (table := rows.constraints) is not None:
        logits = logits.float()
        if table.biases is not None:
            _bias(logits, table.biases, rows)
        if table.penalties is not None:
            penalize(logits, table.penalties, rows)
        _ban(logits, table.banned, rows)
    if rows.allowed is not None:
        _restrict(logits, rows.allowed, rows)
    return logits


def _bias(logits: Tensor, biases: Biases, rows: StepRows) -> None:
    places = to_device(rows.host_places(biases.has), logits.device)
    own = biases.table[biases.slot[rows.row[places]], : logits.shape[-1]]
    logits.index_add_(0, places, own)


def _restrict(logits: Tensor, allowed: AllowedTokens, rows: StepRows) -> None:
    """Set all but the allowed tokens to -inf, at positions that are among `rows`."""
    place, here = _places(rows, allowed.row, allowed.position)
    forbidden = ~allowed.allowed[:, : logits.shape[-1]] & here[:, None]
    nothing = torch.zeros_like(forbidden, dtype=logits.dtype)
    logits.index_add_(0, place, nothing.masked_fill_(forbidden, -torch.inf))


def _ban(logits: Tensor, banned: Tensor, rows: StepRows) -> None:
    """Set single tokens at single positions to -inf, where these are among `rows`."""
    row, position, token = banned
    place, here = _places(rows, row, position)
    known = here & (token < logits.shape[-1])
    nothing = torch.zeros_like(token, dtype=logits.dtype)
    penalty = nothing.masked_fill_(known, -torch.inf)
    logits.index_put_((place, token.clamp(max=logits.shape[-1] - 1)), penalty, accumulate=True)


def _places(rows: StepRows, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Where canvas positions stand among those of `rows`, int64 [n], and which of them do, bool
    [n]: adding nothing where one does not needs no count of them, which a GPU would be waited for.
    """
    stride = max(rows.lengths) + 1
    keys = rows.row * stride + rows.position
    wanted = row * stride + position
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return place, keys[place] == wanted


def _triples(row: ConstrainedRow, positions: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack([torch.full_like(positions, row.row), positions, tokens], dim=-1)


def _early_ends(row: ConstrainedRow) -> Tensor:
    """End tokens at the first `min_tokens` positions: int64 [n, 3]."""
    constraints = row.constraints
    early = row.opened[row.opened < row.first + constraints.min_tokens]
    ends = torch.tensor(constraints.end_token_ids, dtype=torch.int64)
    return _triples(row, early.repeat_interleave(len(ends)), ends.repeat(len(early)))


def _word_ends(row: ConstrainedRow) -> Tensor:
    """Tokens that would complete a bad word with what is committed around: int64 [n, 3].

    A word of one token is in the rules already.
    """
    found = [torch.zeros(0, 3, dtype=torch.int64)]
    for words in _by_length(row.constraints.bad_words):
        at, alike = _compare(row, row.answer, words)
        differing = (~alike).sum(-1)
        window, word = (differing == 1).nonzero().T
        offset = (~alike[window, word]).long().argmax(-1)
        positions = at[window] + offset + row.first
        is_open = torch.isin(positions, row.opened)
        found.append(_triples(row, positions, words[word, offset])[is_open])
    return torch.cat(found)


def _by_length(bad_words: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Words of several tokens, those of the same length together: int64 [words, length] each."""
    lengths = sorted({len(word) for word in bad_words if len(word) > 1})
    return [torch.tensor([w for w in bad_words if len(w) == length]) for length in lengths]


def _compare(row: ConstrainedRow, answer: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Where words might stand around the open positions, and which of their tokens do.

    Args:
        words: int64 [words, length].

    Returns:
        int64 [windows], where each begins in the answer; bool [windows, words, length].
    """
    length = words.shape[-1]
    opened = row.opened[row.opened < row.first + len(answer)] - row.first
    if len(opened) == 0 or len(answer) < length:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, *words.shape, dtype=torch.bool)
    start = max(0, int(opened[0]) - length + 1)
    end = min(len(answer), int(opened[-1]) + length)
    windows = answer[start:end].unfold(0, length, 1) if end - start >= length else answer[:0, None]
    begins = torch.arange(start, start + len(windows))
    return begins, windows[:, None] == words


def hold_back(accept: Tensor, tokens: Tensor, rows: StepRows) -> Tensor:
    """`accept` without the positions that would complete a bad word together.

    Of these an edit waits before a mask, and else the rightmost; for a draft that must be accepted
    as a run, everything right of it waits too. At least one of them is left, so a row that would
    have written something still does.

    Args:
        accept: bool [positions], on the host; as `tokens`, the candidates, int64.
    """
    table = rows.constraints
    if table is None or not any(_by_length(row.constraints.bad_words) for row in table.rows):
        return accept
    accept = accept.clone()
    for row in table.rows:
        groups = _by_length(row.constraints.bad_words)
        if groups:
            own = rows.host_places([i == row.row for i in range(len(rows.params))])
            as_run = rows.params[row.row].policy == "apd"
            accept[own] = _held_back(row, groups, accept[own], tokens[own], as_run)
    return accept


def _held_back(
    row: ConstrainedRow, groups: Sequence[Tensor], accept: Tensor, tokens: Tensor, as_run: bool
) -> Tensor:
    places = row.opened - row.first
    inside = places < len(row.answer)
    while True:
        answer = row.answer.clone()
        written = accept & inside
        answer[places[written]] = tokens[written]
        word = next((at for words in groups for at in _complete(row, answer, words)), None)
        if word is None:
            return accept
        part = written & (places >= word[0]) & (places < word[1])
        edits = part & (row.answer[places.clamp(max=len(row.answer) - 1)] >= 0)
        waits = (edits if edits.any() else part).nonzero()
        if len(waits) == 0:
            return accept
        last = int(waits[-1])
        accept[last : (len(accept) if as_run else last + 1)] = False


def _complete(row: ConstrainedRow, answer: Tensor, words: Tensor) -> list[tuple[int, int]]:
    """Begin and end, in the answer, of the bad words that stand there."""
    at, alike = _compare(row, answer, words)
    begins = at[alike.all(-1).any(-1)].tolist()
    return [(begin, begin + words.shape[-1]) for begin in begins]
