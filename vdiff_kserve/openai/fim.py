"""Fill-in-the-middle completions as Mistral's Codestral has them: a chat's shape around a text.

Inception's clients read the same route's `choices[].text`, so both are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from vdiff_kserve.openai.answers import Piece
from vdiff_kserve.openai.protocol import (
    INT64_MAX,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    CompletionRequest,
    DiffusionInfo,
    Int32,
    Text,
    Usage,
)
from vdiff_kserve.openai.responses import ChatWriter, FinishedAnswer

DEFAULT_MAX_TOKENS = 64
"""Longest hole of a request that sets none."""


class FimRequest(CompletionRequest):
    """The body of `POST fim/completions`: a completion's, with Mistral's name for the seed."""

    prompt: Text
    max_tokens: Int32 | None = DEFAULT_MAX_TOKENS
    random_seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)

    @model_validator(mode="after")
    def _take_seed(self) -> Self:
        if self.random_seed is not None and self.seed is None:
            self.seed = self.random_seed
        return self


class FimChoice(ChatChoice):
    """What fits between prompt and suffix."""

    text: str


class FimCompletion(ChatCompletion):
    """The response of `POST fim/completions`."""

    choices: Sequence[FimChoice]


class FimWriter(ChatWriter):
    """Writes a chat's objects with a text beside each message."""

    def response(self, answers: Sequence[FinishedAnswer]) -> FimCompletion:
        """The whole response."""
        chat = super().response(answers)
        choices = [
            FimChoice(**dict(each), text=each.message.content or "") for each in chat.choices
        ]
        return FimCompletion(**dict(chat) | {"choices": choices})

    def chunks(
        self, piece: Piece | None, usage: Usage | None, info: DiffusionInfo | None
    ) -> list[ChatCompletionChunk]:
        """The chunks of a stream that a piece comes to."""
        chunks = super().chunks(piece, usage, info)
        for chunk in chunks:
            for choice in chunk["choices"]:
                choice["text"] = choice["delta"].get("content", "")
        return chunks
