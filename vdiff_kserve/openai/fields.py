"""What every request field does: it is supported, refused with a reason, or ignored.

A field that would change the answer is never dropped silently. A refused field may still hold its
neutral value, which asks for nothing. `python -m vdiff_kserve.openai.fields` writes the table of
`docs/api.md`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import BaseModel

from vdiff_kserve.openai.decoding import REQUEST_FIELDS
from vdiff_kserve.openai.errors import RequestError

DECODING = "see [decoding](decoding.md)"

SUPPORTED = dict.fromkeys(REQUEST_FIELDS, DECODING) | {
    "add_generation_prompt": "whether the chat template opens the answer",
    "add_special_tokens": "whether the prompt gets the tokenizer's own special tokens",
    "allowed_token_ids": "only these tokens are written",
    "bad_words": "words that are not written: at most 128 runs of tokens; see below",
    "chat_template_kwargs": "variables of the chat template",
    "confidence_eos_eot_inf": DECODING,
    "continue_final_message": "the answer goes on where the last message stops",
    "echo": "the prompt goes before the answer; in chats, the last message when the assistant's is "
    "continued",
    "frequency_penalty": "in [-2, 2], for every time the answer has the token; see below",
    "ignore_eos": "the model's end tokens do not end the answer, and models with a mask token "
    "write no end-of-text token unless `logits_eos_inf` is false",
    "include_stop_str_in_output": "the stop string, or the end token's text, ends the text",
    "infill": "the prompt has holes `<|mask:n|>` to be filled together: [infilling](infilling.md)",
    "infill_lengths": "lengths to try for the hole before `suffix`: [infilling](infilling.md)",
    "likelihood": "how `echo` with `logprobs` scores the prompt: [likelihood](likelihood.md)",
    "logit_bias": "token id to a bias, cut to [-100, 100]",
    "logits_eos_inf": DECODING,
    "logprobs": "true in chats; in completions, how many likeliest tokens, in [0, 20]; see below",
    "max_completion_tokens": "as `max_tokens`, and goes before it",
    "max_tokens": "masks behind the prompt, see [decoding](decoding.md)",
    "messages": "the conversation: text, or lists of text parts",
    "min_tokens": "answer positions from the left without end token or stop string",
    "model": "one of the served names, or left out",
    "n": "answers per prompt",
    "parallel_tool_calls": "false allows one call per answer where calls are forced",
    "prediction": "what the answer will probably be: [predicted outputs](prediction.md)",
    "presence_penalty": "in [-2, 2], for tokens that the answer has; see below",
    "priority": "lower goes first, see [batching](batching.md)",
    "prompt": "a text, a list of texts, token ids, or a list of them",
    "repetition_penalty": "above 0, for tokens that the prompt or the answer has; see below",
    "request_id": "part of the response's id, and in the log",
    "response_format": "`json_object`, `json_schema` or `text`, see "
    "[structured output](structured.md)",
    "return_prompt_text": "adds `prompt_text`, what the chat template made of the messages",
    "return_token_ids": "adds `token_ids`, the end token included, and `prompt_token_ids`",
    "return_tokens_as_token_ids": "`token_id:5` in place of a token's text in `logprobs`",
    "seed": "of the sampling noise; answer j has `seed + j`",
    "skip_special_tokens": "false leaves special tokens in the text",
    "stop": "strings that end the answer",
    "stop_token_ids": "further tokens that end the answer",
    "stream": "answer in chunks",
    "structured_outputs": "`json`, `regex`, `choice`, `grammar` or `json_object`, see "
    "[structured output](structured.md)",
    "stream_canvas": "with `stream`, a chunk without text for every denoising step; see below",
    "stream_options": "`include_usage`, `continuous_usage_stats`",
    "suffix": "the answer is what fits between prompt and suffix: [infilling](infilling.md)",
    "timeout": "seconds that the request may take, see [batching](batching.md)",
    "tool_choice": "`none`, `auto`, `required` or a function, see [tools](structured.md#tools)",
    "tools": "functions that the answer may call, see [tools](structured.md#tools)",
    "truncate_prompt_tokens": "most tokens of a prompt, of which the last are kept; -1 is what "
    "leaves room for `max_tokens`",
    "truncation_side": "`right` keeps the first tokens",
    "vllm_xargs": "`diffusion_max_steps`, `diffusion_seed_canvas`, `diffusion_pinned`: "
    "[predicted outputs](prediction.md)",
    "top_logprobs": "how many likeliest tokens chats tell per token, in [0, 20]; needs `logprobs`",
}

IGNORED = {
    "cache_salt": "prompts in the prefix cache are not kept apart",
    "include_reasoning": "the models have no separate reasoning",
    "kv_transfer_params": "keys and values are not moved between servers",
    "length_penalty": "belongs to beam search",
    "media_io_kwargs": "the models read text only",
    "mm_processor_kwargs": "the models read text only",
    "reasoning_effort": "the models have no separate reasoning",
    "spaces_between_special_tokens": "has no effect with fast tokenizers, the only ones there are",
    "user": "informs only",
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
    "best_of": Refused("no answers are compared; ask for n of them", (None, 1)),
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
        "a diffusion model does not predict its prompt token by token, so that there is no such "
        "probability to tell"
    ),
    "repetition_detection": Refused(
        "an answer is not written from left to right; see repetition_penalty"
    ),
    "thinking_token_budget": Refused("the models have no separate reasoning"),
    "use_beam_search": Refused("diffusion models have no beams", (None, False)),
    "web_search_options": Refused("the server looks nothing up"),
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
    "remasking_strategy": "policy",
    "small_block_size": "block_length",
}
"""Names that the models' own scripts and this server's flags have for request fields."""
MISSPELLED = 0.85
"""Unknown fields this similar to a decoding field are taken for it."""
MAX_UNKNOWN, MAX_NAME = 64, 64
"""Unknown fields that are compared, and their characters: each takes a tenth of a millisecond."""


def refuse_unsupported(request: BaseModel) -> None:
    """Refuse the first field that asks for what this server cannot do, or that is unknown but was
    meant to be a decoding field.

    Raises:
        RequestError: naming the field and the reason.
    """
    refuse_fields(request, REFUSED)
    for field, value in islice((request.model_extra or {}).items(), MAX_UNKNOWN):
        if value is not None and (meant := _meant_by(field)):
            raise RequestError(f"There is no field {field}. Did you mean {meant}?", param=field)


def refuse_fields(request: BaseModel, refused: Mapping[str, Refused]) -> None:
    """Refuse the first field that is among `refused` and asks for something.

    Raises:
        RequestError: naming the field and the reason.
    """
    for field in sorted(request.model_fields_set & refused.keys()):
        if not _is_neutral(getattr(request, field), refused[field].neutral):
            reason = refused[field].reason
            raise RequestError(f"`{field}` is not supported: {reason}.", param=field)


def _meant_by(unknown: str) -> str | None:
    if unknown in NAMED_ELSEWHERE:
        return NAMED_ELSEWHERE[unknown]
    if len(unknown) > MAX_NAME:
        return None
    near = difflib.get_close_matches(unknown.lower(), _OWN, n=1, cutoff=MISSPELLED)
    return near[0] if near else None


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )


def render_table() -> str:
    """Every request field of the table in the documentation, in Markdown."""
    rows = {name: f"supported | {text}" for name, text in SUPPORTED.items()}
    rows |= {name: f"ignored | {text}" for name, text in IGNORED.items()}
    rows |= {name: f"refused | {each.reason}" for name, each in REFUSED.items()}
    lines = [f"| `{name}` | {rows[name]} |" for name in sorted(rows) if name not in _OWN]
    return "\n".join(["| field | here | what it does, or why not |", "|---|---|---|", *lines])


_OWN = REQUEST_FIELDS.union(("logits_eos_inf", "confidence_eos_eot_inf")).difference(
    ("temperature", "top_p", "top_k", "min_p")
)
"""Fields that only this server has; the decoding page explains them."""

if __name__ == "__main__":
    sys.stdout.write(render_table() + "\n")
