"""What stands on the canvases of a request: its prompts, the room for answers, and holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.infilling import (
    Infilling,
    check_infilling,
    holes_of,
    suffix_infilling,
    with_beginning,
)
from vdiff_kserve.openai.limits import ServingLimits, answer_length, check_token_ids
from vdiff_kserve.openai.prompts import (
    TokenIds,
    chat_prompt,
    completion_prompts,
    encode,
    truncated,
)
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest


@dataclass(frozen=True)
class Canvases:
    """One per prompt.

    Attributes:
        prompts: the tokens that stand first.
        lengths: masked positions of the answers.
        infillings: what stands behind the prompts; empty when nothing does.
        echoes: the prompts' texts, where they go before the answers; else empty.
    """

    prompts: Sequence[TokenIds]
    lengths: Sequence[int]
    infillings: Sequence[Infilling] = ()
    echoes: Sequence[str] = ()


def canvases_of(
    request: ChatCompletionRequest | CompletionRequest,
    tokenizer: PreTrainedTokenizerFast,
    limits: ServingLimits,
    most_characters: int,
) -> Canvases:
    """The canvases of a request.

    Args:
        most_characters: of a conversation, as `chat_prompt` has it.

    Raises:
        RequestError: a field is wrong, there is no room, or the model lacks one of the tokens.
    """
    canvases = _canvases_of(request, tokenizer, limits, most_characters)
    field = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
    behind = [candidate for each in canvases.infillings for candidate in each.candidates]
    for ids in (*canvases.prompts, *behind):  # some tokenizers have more tokens than their model
        check_token_ids(field, ids, limits)
    return canvases


def _canvases_of(
    request: ChatCompletionRequest | CompletionRequest,
    tokenizer: PreTrainedTokenizerFast,
    limits: ServingLimits,
    most_characters: int,
) -> Canvases:
    if isinstance(request, ChatCompletionRequest):
        prompt = chat_prompt(request, tokenizer, limits, most_characters)
        prompts = [truncated(prompt, request, limits)]
        echoes = [_continued(request)] if request.echo else []
        return Canvases(prompts, [answer_length(request, len(prompts[0]), limits)], echoes=echoes)
    check_infilling(request, limits)
    if request.infill:
        return _marked(request, tokenizer, limits)
    prompts = completion_prompts(request, tokenizer, limits)
    prompts = [truncated(prompt, request, limits) for prompt in prompts]
    echoes = _echoes(request, prompts, tokenizer) if request.echo else []
    if not request.suffix:
        lengths = [answer_length(request, len(prompt), limits) for prompt in prompts]
        return Canvases(prompts, lengths, echoes=echoes)
    suffix = len(encode(tokenizer, request.suffix, add_special_tokens=False))
    lengths = [answer_length(request, len(prompt) + suffix, limits) for prompt in prompts]
    answers = len(prompts) * (request.n or 1)
    infillings = [
        suffix_infilling(request, tokenizer, length, limits.max_choices // answers)
        for length in lengths
    ]
    rows = answers * len(infillings[0].candidates)
    if rows > limits.max_choices:
        raise RequestError(
            "infill_lengths times n times the number of prompts must be at most "
            f"{limits.max_choices}, got {rows}.",
            param="infill_lengths",
        )
    return Canvases(prompts, lengths, infillings, echoes)


def _marked(
    request: CompletionRequest, tokenizer: PreTrainedTokenizerFast, limits: ServingLimits
) -> Canvases:
    """The canvases of texts with marked holes."""
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError("infill needs a prompt of text, or several.", param="prompt")
    prompts, infillings = [], []
    for text in texts:
        before, infilling = holes_of(
            str(text),
            tokenizer,
            limits.max_model_len - 1,
            add_special_tokens=request.add_special_tokens,
        )
        prompts.append(with_beginning(before, tokenizer))
        infillings.append(infilling)
    return Canvases(prompts, [len(each.candidates[0]) for each in infillings], infillings)


def _continued(request: ChatCompletionRequest) -> str:
    """The last message, when the answer is by the same role."""
    last = request.messages[-1]
    if last.role != "assistant" or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "\n".join(part.words or "" for part in last.content)


def _echoes(
    request: CompletionRequest, prompts: Sequence[TokenIds], tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """The prompts as they were given, or the text of their tokens."""
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
    if request.truncate_prompt_tokens is None and all(isinstance(each, str) for each in given):
        return [str(each) for each in given]
    return [
        tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False) for prompt in prompts
    ]
