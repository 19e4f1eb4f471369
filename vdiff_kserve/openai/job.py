"""A request that passed every check: what the engine is asked for it, and how it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vdiff_kserve.engine import GenerationRequest
from vdiff_kserve.openai.infilling import Infilling
from vdiff_kserve.openai.likelihood import Scorer
from vdiff_kserve.openai.limits import with_seed_of
from vdiff_kserve.openai.prompts import TokenIds
from vdiff_kserve.openai.tools import ToolUse
from vdiff_kserve.sampler import DecodingParams


@dataclass(frozen=True)
class Output:
    """What a request wants to see of its answers; the fields are the request's.

    Attributes:
        min_tokens: stop strings do not count within so many tokens.
        logprobs: tell the tokens' log probabilities.
        steps: tell every denoising step.
    """

    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    min_tokens: int = 0
    logprobs: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Job:
    """A request that passed every check.

    Attributes:
        prompts: token ids of each prompt.
        lengths: masked positions after each prompt.
        n: answers per prompt; answer `j` of prompt `i` has the index `i * n + j`.
        decoding: of the first answer; the further ones count its seed up.
        decoding_report: what the response tells about it.
        end_token_ids: tokens that end an answer.
        extra_end_ids: those of them that the request named itself.
        priority: lower goes first.
        deadline: when to give up, on the clock of `time.monotonic`; None never.
        output: how the answers are told.
        grammar: what the answers must match; None is anything.
        tools: how the answers may call functions; None is not at all.
        infillings: of each prompt, what stands behind it; empty when nothing does.
        draft: what the answers will probably be, -1 for a token that is not known.
        pinned: tokens of the answers that stand from the beginning, -1 for a mask.
        echoes: of each prompt, the text that goes before its answers; empty without echo.
        scorer: how the echoed prompts are scored; None when they are not.
        prompt_text: what a chat's prompt was, for a request that wants to see it.
    """

    request_id: str
    model: str
    prompts: Sequence[TokenIds]
    lengths: Sequence[int]
    n: int
    decoding: DecodingParams
    decoding_report: Mapping[str, Any]
    stops: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    extra_end_ids: tuple[int, ...]
    priority: int = 0
    deadline: float | None = None
    output: Output = Output()
    grammar: str | None = None
    tools: ToolUse | None = None
    infillings: Sequence[Infilling] = ()
    draft: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()
    echoes: Sequence[str] = ()
    scorer: Scorer | None = None
    prompt_text: str | None = None

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def tells_logprobs(self) -> bool:
        return self.output.logprobs

    @property
    def tells_prompt(self) -> bool:
        return self.output.return_token_ids or self.prompt_text is not None

    @property
    def prompt_tokens(self) -> int:
        given = sum(each.given_tokens for each in self.infillings)
        return sum(len(prompt) for prompt in self.prompts) + given

    def infilling(self, index: int) -> Infilling | None:
        """What the canvas of answer number `index` holds behind the prompt."""
        return self.infillings[index // self.n] if self.infillings else None

    def engine_requests(self) -> list[list[GenerationRequest]]:
        """What the engine has to do for each answer: first what generates it, then what scores its
        prompt."""
        return [
            [*self._generating(i, choice), *self._scoring(i, choice)]
            for i in range(len(self.prompts))
            for choice in range(self.n)
        ]

    def _generating(self, i: int, choice: int) -> list[GenerationRequest]:
        plain = self._request(i, choice)
        if self.infillings:
            candidates = self.infillings[i].candidates
            judged = len(candidates) > 1
            decoding = plain.decoding
            if judged and decoding.top_logprobs is None:
                decoding = replace(decoding, top_logprobs=0)
            return [
                replace(
                    plain,
                    max_tokens=len(given),
                    decoding=decoding,
                    given=given,
                    infills=True,
                    judged=judged,
                )
                for given in candidates
            ]
        if plain.max_tokens == 0:
            return []
        room = plain.max_tokens
        pinned = self.pinned and (self.pinned + (-1,) * room)[:room]
        return [replace(plain, given=pinned, draft=self.draft[:room])]

    def _scoring(self, i: int, choice: int) -> list[GenerationRequest]:
        if self.scorer is None:
            return []
        plain = replace(self._request(i, choice), max_tokens=0, grammar=None, watched=False)
        return [replace(plain, scoring=part) for part in self.scorer.parts(self.prompts[i])]

    def _request(self, i: int, choice: int) -> GenerationRequest:
        decoding = with_seed_of(self.decoding, choice)
        if self.output.steps and decoding.top_logprobs is None:
            decoding = replace(decoding, top_logprobs=0)
        return GenerationRequest(
            prompt_ids=self.prompts[i],
            max_tokens=self.lengths[i],
            decoding=decoding,
            end_token_ids=self.end_token_ids,
            request_id=self.request_id,
            priority=self.priority,
            deadline=self.deadline,
            grammar=self.grammar,
            watched=self.output.steps,
        )
