"""From messages and prompts to token ids."""

from __future__ import annotations

from inspect import signature
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.openai.errors import RequestError, nested_too_deep, out_of_range, shorten
from vdiff_kserve.openai.limits import (
    ServingLimits,
    check_token_ids,
    room_beside_answer,
    too_many_characters,
)
from vdiff_kserve.openai.literals import Literals
from vdiff_kserve.openai.near_misses import LONGEST, edits
from vdiff_kserve.openai.protocol import (
    ChatCompletionRequest,
    ChatMessageParam,
    CompletionRequest,
    ContentPart,
)
from vdiff_kserve.openai.tools import (
    as_plain_text,
    read_arguments,
    tool_text,
    tool_use,
    with_tool_text,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
"""OpenAI's, of which a chat template may have others beside."""

TokenIds = tuple[int, ...]
"""Token ids of a text."""

TEMPLATE_ARGUMENTS = frozenset(
    (*signature(PreTrainedTokenizerFast.apply_chat_template).parameters, "messages")
)
"""Arguments of the renderer, and what it gives templates; the rest of `chat_template_kwargs` are
variables of the template."""


def chat_prompt(
    request: ChatCompletionRequest,
    tokenizer: PreTrainedTokenizerFast,
    limits: ServingLimits,
    most_characters: int | None = None,
) -> TokenIds:
    """The conversation as the model's chat template writes it, with the functions it may call.

    Args:
        most_characters: how long it may be, with all that the template writes of each message;
            None is any length.

    Raises:
        RequestError: there is no message, a part is not text, it is too long, or the template
            refuses.
    """
    if not request.messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    if tokenizer.chat_template is None:
        raise RequestError(
            "This checkpoint has no chat template. Start the server with --chat_template FILE, or "
            "send a prompt to /v1/completions.",
            param="messages",
        )
    use = tool_use(request, limits)
    template = str(tokenizer.chat_template)
    messages = [
        read_arguments(_message(message, i, template), i)
        for i, message in enumerate(request.messages)
    ]
    tools = None
    if limits.template_takes_tools:
        tools = [tool.model_dump(exclude_unset=True) for tool in use.tools] if use else None
    else:
        messages = [as_plain_text(message, limits.tool_call_parser) for message in messages]
        if use is not None and limits.tools_in_prompt:
            messages = with_tool_text(messages, tool_text(use))
    variables = request.chat_template_kwargs or {}
    if reserved := TEMPLATE_ARGUMENTS & variables.keys():
        raise RequestError(
            f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}.",
            param="chat_template_kwargs",
        )
    literals = Literals.of(tokenizer)
    marker = literals.marker([messages, variables, tools])
    if marker is not None:
        messages, variables, tools = literals.marked([messages, variables, tools], marker)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            **variables,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise RequestError(
            f"The chat template does not accept these messages: {error}", param="messages"
        ) from error
    if most_characters is not None and len(text) > most_characters:
        raise too_many_characters(len(text), limits)
    add_special_tokens = request.add_special_tokens
    if marker is None:
        return encode(tokenizer, str(text), add_special_tokens=add_special_tokens)
    _require_characters(str(text))
    return tuple(
        literals.encode(tokenizer, str(text), marker, add_special_tokens=add_special_tokens)
    )


def truncated(
    prompt: TokenIds, request: ChatCompletionRequest | CompletionRequest, limits: ServingLimits
) -> TokenIds:
    """The end of a prompt, or its beginning, where the request wants it cut.

    Raises:
        RequestError: nothing would be left, or more than the context.
    """
    most = request.truncate_prompt_tokens
    if most is None:
        return prompt
    if most == -1:
        most = room_beside_answer(request, limits)
    if not 1 <= most <= limits.max_model_len:
        allowed = f"-1 or in [1, {limits.max_model_len}], the model's context length"
        raise out_of_range("truncate_prompt_tokens", allowed, most)
    return prompt[:most] if request.truncation_side == "right" else prompt[-most:]


def _check_role(role: str, where: str, template: str) -> None:
    """Refuse a misspelled role, which templates write as it is or leave out. Others are theirs."""
    if role in ROLES or len(role) > LONGEST or not role.isalpha() or role in template:
        return
    if meant := next((each for each in ROLES if edits(role.lower(), each) <= 1), None):
        raise RequestError(
            f"{where} is {role}. Did you mean {meant}? Roles are {', '.join(ROLES)}, and those "
            "that the chat template has beside them.",
            param=where,
        )


def _message(message: ChatMessageParam, index: int, template: str) -> dict[str, Any]:
    """A message as templates read it: `developer` is OpenAI's newer name for `system`, which not
    every template knows, and an assistant may have said nothing."""
    _check_role(message.role, f"messages.{index}.role", template)
    where = f"messages.{index}.content"
    content, others = message.content, message.model_extra or {}
    if others.get("function_call") is not None:
        raise RequestError(
            f"messages.{index}.function_call is not supported: OpenAI replaced it by tool_calls.",
            param=f"messages.{index}.function_call",
        )
    if content is None and message.role != "assistant":
        raise RequestError(f"{where} must be text or a list of text parts.", param=where)
    if isinstance(content, list):
        content = "\n".join(_words(part, where) for part in content)
    try:
        fields = message.model_dump(exclude_unset=True)
    except ValueError as error:  # pydantic's limit; its fields are whatever a template may read
        raise nested_too_deep(f"messages.{index}") from error
    if message.role == "developer" and "developer" not in template:
        fields["role"] = "system"
    return fields | {"content": content or ""}


def _words(part: ContentPart, where: str) -> str:
    if part.words is None:
        raise RequestError(
            f"{where} has a part of type {shorten(part.type)} that holds no text; this model reads "
            "text only.",
            param=where,
        )
    return part.words


def completion_prompts(
    request: CompletionRequest, tokenizer: PreTrainedTokenizerFast, limits: ServingLimits
) -> list[TokenIds]:
    """Each prompt of the request; texts are tokenized, token ids are checked.

    Raises:
        RequestError: there is no prompt, one is empty, or an id is not in the vocabulary.
    """
    prompt = request.prompt
    if prompt is None or prompt == "" or prompt == []:
        raise RequestError("prompt must be given and not be empty.", param="prompt")
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    else:
        prompts = [prompt] if isinstance(prompt[0], int) else list(prompt)
    encoded = [
        encode(tokenizer, each, add_special_tokens=request.add_special_tokens)
        if isinstance(each, str)
        else tuple(each)
        for each in prompts
    ]
    for ids in encoded:
        if not ids:
            raise RequestError("prompt must not hold an empty prompt.", param="prompt")
        check_token_ids("prompt", ids, limits)
    return encoded


def encode(tokenizer: PreTrainedTokenizerFast, text: str, *, add_special_tokens: bool) -> TokenIds:
    """The tokens of a text.

    Raises:
        RequestError: it has what is no character.
    """
    _require_characters(text)
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _require_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("The prompt has a lone surrogate, which is no character.") from error
