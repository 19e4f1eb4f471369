"""What a program with litellm does: chat, stream, text completion, errors as its own classes."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

ADDRESS = {"api_base": os.environ["BASE_URL"], "api_key": "none"}
ASKED = [{"role": "user", "content": "What is 17 + 25?"}]

answer = litellm.completion("openai/llada", messages=ASKED, max_tokens=64, temperature=0, **ADDRESS)
text = answer.choices[0].message.content
assert "42" in text, text
assert answer.choices[0].finish_reason == "stop"
assert answer.usage.completion_tokens > 0

stream = litellm.completion(
    "openai/llada", messages=ASKED, max_tokens=64, temperature=0, stream=True,
    stream_options={"include_usage": True}, **ADDRESS,
)  # fmt: skip
chunks = list(stream)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
assert any(getattr(c, "usage", None) for c in chunks)

own = litellm.completion(
    "openai/llada", messages=ASKED, max_tokens=64, extra_body={"policy": "threshold"}, **ADDRESS
)
assert own.choices[0].message.content

plain = litellm.text_completion(
    model="text-completion-openai/llada", prompt="The capital of France is", max_tokens=8, **ADDRESS
)
assert plain.choices[0].text

middle = litellm.text_completion(
    model="text-completion-codestral/llada", prompt="The capital of France is", suffix=". It is a",
    max_tokens=4, api_base=f"{os.environ['BASE_URL']}/fim/completions", api_key="none",
)  # fmt: skip
assert middle.choices[0].text == " Paris", middle

response = litellm.responses(
    model="openai/llada", input="What is 17 + 25?", max_output_tokens=64, temperature=0, **ADDRESS
)
assert response.output[0].content[0].text == text

schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
made = litellm.completion(
    "openai/llada", messages=ASKED, max_tokens=64, response_format=form, **ADDRESS
)
assert isinstance(json.loads(made.choices[0].message.content)["sum"], int)

try:
    litellm.completion(
        "openai/llada", messages=[{"role": "user", "content": "x " * 5000}], **ADDRESS
    )
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt that is too long is no ContextWindowExceededError")

try:
    litellm.completion("openai/nope", messages=ASKED, **ADDRESS)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model is no NotFoundError")
