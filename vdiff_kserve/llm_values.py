"""What goes into the Python API and what comes out of it; the shapes are vLLM's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from vdiff_kserve.openai.answers import Piece
from vdiff_kserve.openai.errors import RequestError, invalid_body
from vdiff_kserve.openai.logprobs import ScoredToken
from vdiff_kserve.openai.protocol import FinishReason, GenerationFields
from vdiff_kserve.openai.work import Work
from vdiff_kserve.sampler import MAX_TOP_LOGPROBS


def near(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, as a question."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


OF_RESPONSES = frozenset(
    (
        "model",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stream",
        "stream_canvas",
        "stream_options",
    )
)
"""Fields of requests that shape a server's response, and would change nothing here."""


class SamplingParams(GenerationFields):
    """How answers are generated: the fields of a request, but for those that only shape
    a server's response. `docs/api.md` says what each does.

    `max_tokens` None is the model's `default_max_tokens`. `logprobs` is how many of the likeliest
    tokens to tell beside each token's log probability.

    Raises:
        RequestError: a field that does not exist, or with a value of the wrong type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def __init__(self, **fields: Any) -> None:
        known = type(self).model_fields.keys() - OF_RESPONSES
        for name in fields.keys() - known:
            why = "; it shapes a server's response" if name in OF_RESPONSES else near(name, known)
            raise RequestError(f"{name} is not a field of SamplingParams{why}", param=name)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise invalid_body(error.errors()) from None


@dataclass(frozen=True)
class Logprob:
    """How likely a token was when the answer's token was committed.

    Attributes:
        rank: among the tokens that could have been written, from 1.
        decoded_token: the token alone as text.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One answer.

    Attributes:
        token_ids: its tokens without the end token; where a stop string ended the answer, up to the
            one that completed it.
        logprobs: of each token, and of the end token behind them: the token itself, then the
            likeliest in its place, by token id. None when not asked for.
        holes: what was written into each hole of a prompt with `infill`; else None.
        nfe: forward passes of the diffusion model that the answer took part in.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    nfe: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    holes: list[str] | None = None


@dataclass
class RequestOutput:
    """The answers to one prompt, as far as they are written.

    Attributes:
        prompt: the prompt's text; None for a chat, or when it was given as tokens.
        num_cached_tokens: prompt tokens that came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0


def output_of(work: Work, prompt: str | None) -> RequestOutput:
    """The output of a request of which nothing is written yet."""
    told = work.job.tells_logprobs
    answers = [
        CompletionOutput(index, logprobs=[] if told else None)
        for index in range(work.job.num_answers)
    ]
    return RequestOutput(work.job.request_id, prompt, list(work.job.prompts[0]), answers)


def add_piece(output: RequestOutput, piece: Piece, *, finished: bool) -> None:
    """Let an output grow by what became final of one of its answers."""
    answer = output.outputs[piece.index]
    answer.text += piece.text
    answer.token_ids += piece.token_ids
    if answer.logprobs is not None:
        answer.logprobs += [_by_token(each) for each in piece.logprobs]
    answer.finish_reason = piece.finish_reason
    answer.stop_reason = piece.stop_reason
    answer.nfe = piece.stats.nfe
    answer.holes = None if piece.holes is None else list(piece.holes)
    output.num_cached_tokens = piece.stats.cached_tokens
    output.finished = finished


def _by_token(chosen: ScoredToken) -> dict[int, Logprob]:
    return {
        each.token_id: Logprob(each.logprob, each.rank, each.text) for each in (chosen, *chosen.top)
    }
