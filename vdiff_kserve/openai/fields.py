"""What every request field does: it is supported, refused with a reason, or ignored.

A field that would change the answer is never dropped silently. A refused field may still hold its
neutral value, which asks for nothing. `python -m vdiff_kserve.openai.fields` writes the table of
`docs/api.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from pydantic import BaseModel

from vdiff_kserve.openai.decoding import REQUEST_FIELDS
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.near_misses import Names
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest

MAX_STEPS, SEED_CANVAS, PINNED = XARGS = (
    "diffusion_max_steps",
    "diffusion_seed_canvas",
    "diffusion_pinned",
)
"""vLLM's names, among its `vllm_xargs`, for `steps` and for what is known of an answer."""

DECODING = "see [decoding](decoding.md)"

SUPPORTED = dict.fromkeys(REQUEST_FIELDS, DECODING) | {
    "add_generation_prompt": "whether the chat template opens the answer",
    "add_special_tokens": "whether the prompt gets the tokenizer's own special tokens",
    "allowed_token_ids": "only these tokens are written",
    "bad_words": "words that are not written, at most 128: [constraints](#constraints)",
    "chat_template_kwargs": "variables of the chat template",
    "confidence_eos_eot_inf": DECODING,
    "continue_final_message": "the answer goes on where the last message stops",
    "echo": "the answer starts with the prompt; in chats, with the assistant's message that is "
    "continued",
    "frequency_penalty": "in [-2, 2], for every time the answer has the token: "
    "[constraints](#constraints)",
    "ignore_eos": "the model's end tokens do not end the answer, and models with a mask token "
    "write no end-of-text token unless `logits_eos_inf` is false",
    "include_stop_str_in_output": "the text includes the stop string or end token at its end",
    "infill": "the prompt has holes `<|mask:n|>` to be filled together: [infilling](infilling.md)",
    "infill_lengths": "lengths to try for the hole before `suffix`: [infilling](infilling.md)",
    "likelihood": "how `echo` with `logprobs` scores the prompt: [likelihood](likelihood.md)",
    "logit_bias": "an object of token ids and their biases, clamped to [-100, 100]",
    "logits_eos_inf": DECODING,
    "logprobs": "true in chats; in completions, the number of likeliest tokens, in [0, 20]: "
    "[answers](#answers)",
    "max_completion_tokens": "the same as `max_tokens`, and overrides it",
    "max_tokens": "number of masks after the prompt, see [decoding](decoding.md#the-canvas)",
    "messages": "the conversation: text, or lists of text parts",
    "min_tokens": "number of tokens at the start of the answer without end token or stop string",
    "model": "one of the served names, or left out",
    "n": "answers per prompt",
    "parallel_tool_calls": "false allows one call per answer if calls are forced",
    "prediction": "what the answer will probably be: [predicted outputs](prediction.md)",
    "presence_penalty": "in [-2, 2], for tokens that the answer has: [constraints](#constraints)",
    "priority": "lower values run first, see [batching](batching.md)",
    "prompt": "a text, a list of texts, token ids, or a list of them",
    "repetition_penalty": "above 0, for tokens that the prompt or the answer has: "
    "[constraints](#constraints)",
    "request_id": "becomes part of the response's id and is logged",
    "response_format": "`json_object`, `json_schema` or `text`, see "
    "[structured output](structured.md)",
    "return_prompt_text": "adds `prompt_text`, the prompt that the chat template made",
    "return_token_ids": "adds `token_ids`, the end token included, and `prompt_token_ids`",
    "return_tokens_as_token_ids": "`token_id:5` in place of a token's text in `logprobs`",
    "seed": "seed of the random numbers; answer j has `seed + j`",
    "skip_special_tokens": "false keeps special tokens in the text",
    "stop": "strings that end the answer",
    "stop_token_ids": "token ids that also end the answer",
    "stream": "answer in chunks",
    "structured_outputs": "`json`, `regex`, `choice`, `grammar` or `json_object`, see "
    "[structured output](structured.md)",
    "stream_canvas": "a chunk without text for every denoising step; needs `stream`: "
    "[answers](#answers)",
    "stream_options": "`include_usage`, `continuous_usage_stats`",
    "suffix": "the text after a hole that the answer fills: [infilling](infilling.md)",
    "timeout": "of the request, in seconds, see [batching](batching.md)",
    "tool_choice": "`none`, `auto`, `required` or a function, see [tools](structured.md#tools)",
    "tools": "functions that the answer may call, see [tools](structured.md#tools)",
    "truncate_prompt_tokens": "maximum number of prompt tokens; the last ones are kept; -1 leaves "
    "room for `max_tokens`",
    "truncation_side": "`right` keeps the first tokens",
    "vllm_xargs": "`diffusion_max_steps`, `diffusion_seed_canvas`, `diffusion_pinned`: "
    "[predicted outputs](prediction.md)",
    "top_logprobs": "number of likeliest tokens per token, in [0, 20]; needs `logprobs`",
}

IGNORED = {
    "cache_salt": "all requests share one prefix cache",
    "include_reasoning": "the models have no separate reasoning",
    "kv_transfer_params": "the KV cache is not moved between servers",
    "length_penalty": "belongs to beam search",
    "media_io_kwargs": "the models read text only",
    "mm_processor_kwargs": "the models read text only",
    "reasoning_effort": "the models have no separate reasoning",
    "spaces_between_special_tokens": "has no effect with fast tokenizers; others are not used",
    "user": "does not affect the answer",
}


@dataclass(frozen=True)
class Refused:
    """A field that is refused.

    Attributes:
        reason: why, after the field's name.
        neutral: the values that ask for nothing.
    """

    reason: str
    neutral: tuple[Any, ...] = (None,)


_NEWER_NAMES = "OpenAI replaced it by tools and tool_choice"

REFUSED = {
    "audio": Refused("answers are text"),
    "best_of": Refused("answers are not compared; use n instead", (None, 1)),
    "chat_template": Refused("templates come from the checkpoint only"),
    "documents": Refused("chat templates get messages only", (None, [])),
    "function_call": Refused(_NEWER_NAMES, (None, "none", "auto")),
    "functions": Refused(_NEWER_NAMES, (None, [])),
    **{
        f"guided_{kind}": Refused(f"vLLM replaced it by structured_outputs.{kind}")
        for kind in ("choice", "grammar", "json", "regex")
    },
    "modalities": Refused("answers are text", (None, [], ["text"])),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "prompt_logprobs": Refused(
        "a diffusion model does not predict its prompt token by token, so it has no such "
        "probabilities"
    ),
    "repetition_detection": Refused(
        "an answer is not written from left to right; see repetition_penalty"
    ),
    "thinking_token_budget": Refused("the models have no separate reasoning"),
    "use_beam_search": Refused("diffusion models have no beams", (None, False)),
    "web_search_options": Refused("the server does not search the web"),
}


NAMED_ELSEWHERE = {
    "alg": "policy",
    "block_size": "block_length",
    "confidence_threshold": "threshold",
    "denoising_steps": "steps",
    "diffusion_steps": "steps",
    "enable_apd": "apd",
    "gen_length": "max_tokens",
    "kv_window": "apd_window",
    "max_new_tokens": "max_tokens",
    "num_steps": "steps",
    "remasking_strategy": "policy",
    "small_block_size": "block_length",
}
"""Names that the models' own scripts and this server's flags have for request fields."""
MISPLACED = {
    "extra_body": "extra_body is the word of OpenAI's Python client for fields that it does not "
    "know; in the body itself, they stand beside the others.",
} | {name: f"{name} is a field of vllm_xargs, not of the request." for name in XARGS}
"""Names that stand in a request where they mean nothing, and where they belong."""
KINDS: dict[type[BaseModel], str] = {
    ChatCompletionRequest: "chats",
    CompletionRequest: "completions",
}
MAX_UNKNOWN = 64
"""Unknown fields that are compared: each takes up to a fifth of a millisecond."""


def refuse_unsupported(request: BaseModel) -> None:
    """Refuse the first field that asks for what this server cannot do, that belongs to the other
    endpoint, or that is unknown but was meant to be a known one. Beside the known one, it is a
    field of the client's own.

    Raises:
        RequestError: naming the field and the reason.
    """
    refuse_fields(request, REFUSED)
    for field, value in islice((request.model_extra or {}).items(), MAX_UNKNOWN):
        if value is None:
            continue
        if value != {} and (why := MISPLACED.get(field)):
            raise RequestError(why, param=field)
        _refuse_of_other_kind(request, field, value)
        meant = NAMED_ELSEWHERE.get(field) or _known().meant_by(field)
        if meant and meant != field and not _has(request, meant):
            raise _no_field(field, meant)
    for path, part in _parts(request):
        refuse_misspelled(part, _names_of(type(part)), path)


def refuse_misspelled(part: BaseModel, names: Names, path: str = "") -> None:
    """Refuse the first field that an object does not know but that was meant to be another, which
    the object does not have.

    Args:
        names: what it may be meant to be.
        path: where the object stands in the request, with a point at the end.

    Raises:
        RequestError: naming the field and the one that was meant.
    """
    for field, value in islice((part.model_extra or {}).items(), MAX_UNKNOWN):
        meant = None if value is None else names.meant_by(field)
        if meant and not _has(part, meant):
            raise _no_field(path + field, path + meant)


def _has(part: BaseModel, name: str) -> bool:
    """Whether an object was given the field that JSON calls so: who knows a name does not misspell
    it."""
    fields = type(part).model_fields.items()
    own = next((own for own, field in fields if field.alias == name), name)
    return own in part.model_fields_set and getattr(part, own) is not None


def _no_field(field: str, meant: str) -> RequestError:
    return RequestError(f"There is no field {field}. Did you mean {meant}?", param=field)


def _parts(whole: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    """The objects that a request holds and where, but for messages and tools: templates read
    those."""
    for name, field in type(whole).model_fields.items():
        part = getattr(whole, name)
        if isinstance(part, BaseModel):
            inside = f"{path}{field.alias or name}."
            yield inside, part
            yield from _parts(part, inside)


def _refuse_of_other_kind(request: BaseModel, field: str, value: Any) -> None:
    """Refuse a field of completions in a chat, and of chats in a completion, when it asks for
    something there."""
    own = next((kind for kind in KINDS if isinstance(request, kind)), None)
    others = [kind for kind in KINDS if kind is not own and field in kind.model_fields]
    if own is None or not others or field not in SUPPORTED:
        return
    neutral = [others[0].model_fields[field].default]
    if field == "max_completion_tokens":  # load generators send both names to both endpoints
        neutral.append(getattr(request, "max_tokens", None))
    if field == "tool_choice":
        neutral += ["none", "auto"]
    if value and value not in neutral:
        raise RequestError(
            f"{field} is a field of {KINDS[others[0]]}, not of {KINDS[own]}.", param=field
        )


@cache
def _known() -> Names:
    """Those names that change an answer, or are refused because they would."""
    return Names((SUPPORTED.keys() | REFUSED.keys()) - {"request_id"})


@cache
def _names_of(kind: type[BaseModel]) -> Names:
    return Names(field.alias or name for name, field in kind.model_fields.items())


def refuse_fields(request: BaseModel, refused: Mapping[str, Refused]) -> None:
    """Refuse the first field that is among `refused` and asks for something.

    Raises:
        RequestError: naming the field and the reason.
    """
    for field in sorted(request.model_fields_set & refused.keys()):
        if not _is_neutral(getattr(request, field), refused[field].neutral):
            reason = refused[field].reason
            raise RequestError(f"`{field}` is not supported: {reason}.", param=field)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )


def render_table() -> str:
    """Every request field of the table in the documentation, in Markdown."""
    rows = {name: f"supported | {text}" for name, text in SUPPORTED.items()}
    rows |= {name: f"ignored | {text}" for name, text in IGNORED.items()}
    rows |= {name: f"refused | {each.reason}" for name, each in REFUSED.items()}
    lines = [f"| `{name}` | {_kinds(name)} | {rows[name]} |" for name in sorted(rows.keys() - _OWN)]
    return "\n".join(
        ["| field | of | here | what it does, or why not |", "|---|---|---|---|", *lines]
    )


def _kinds(field: str) -> str:
    of = [name for kind, name in KINDS.items() if field in kind.model_fields]
    return "both" if len(of) > 1 else of[0]


_OWN = REQUEST_FIELDS.union(("logits_eos_inf", "confidence_eos_eot_inf")).difference(
    ("temperature", "top_p", "top_k", "min_p")
)
"""Fields that only this server has; the decoding page explains them."""

if __name__ == "__main__":
    sys.stdout.write(render_table() + "\n")
