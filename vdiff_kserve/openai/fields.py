"""What every request field does: it is supported, refused with a reason, or ignored.

A field that would change the answer is never dropped silently. A refused field may still hold its
neutral value, which asks for nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from vdiff_kserve.openai.decoding import REQUEST_FIELDS
from vdiff_kserve.openai.errors import RequestError

SUPPORTED = REQUEST_FIELDS | frozenset(
    (
        "add_generation_prompt", "add_special_tokens", "chat_template_kwargs",
        "confidence_eos_eot_inf", "continue_final_message", "ignore_eos", "logits_eos_inf",
        "max_completion_tokens", "max_tokens", "messages", "model", "n", "priority", "prompt",
        "request_id", "seed", "stop", "stop_token_ids", "stream", "stream_options", "timeout",
    )
)  # fmt: skip

IGNORED = {
    "cache_salt": "prompts in the prefix cache are not kept apart",
    "include_reasoning": "the models have no separate reasoning",
    "kv_transfer_params": "keys and values are not moved between servers",
    "length_penalty": "belongs to beam search",
    "media_io_kwargs": "the models read text only",
    "mm_processor_kwargs": "the models read text only",
    "parallel_tool_calls": "matters with tools only",
    "reasoning_effort": "the models have no separate reasoning",
    "return_tokens_as_token_ids": "matters with logprobs only",
    "spaces_between_special_tokens": "matters without skip_special_tokens only",
    "truncation_side": "matters with truncate_prompt_tokens only",
    "user": "informs only",
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "documents": (None, []),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include_stop_str_in_output": (None, False),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_tokens": (None, 0),
    "presence_penalty": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "repetition_detection": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "return_prompt_text": (None, False),
    "return_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "structured_outputs": (None,),
    "suffix": (None,),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none"),
    "tools": (None,),
    "top_logprobs": (None, 0),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
}
"""Refused fields, each with the values that ask for nothing."""


def refuse_unsupported(request: BaseModel) -> None:
    """Refuse the first field that asks for what this server cannot do.

    Raises:
        RequestError: naming the field.
    """
    for field in sorted(request.model_fields_set & REFUSED.keys()):
        value = getattr(request, field)
        if _is_neutral(value, REFUSED[field]) or (
            field == "tools" and value and getattr(request, "tool_choice", None) == "none"
        ):
            continue
        raise RequestError(f"`{field}` is not supported by this server.", param=field)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )
