"""What a program with pydantic-ai does, over both of OpenAI's protocols: answers, conversations,
objects by tool and by schema, streams, tools."""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ASKED = "What is 17 + 25?"
TEXT = "Extract name and age as JSON: Anna is 34 years old."
SETTINGS = {"max_tokens": 64, "temperature": 0}


class Person(BaseModel):
    """Someone with an age."""

    name: str
    age: int


def weather(city: str) -> str:
    """How the weather is."""
    return f"sunny in {city}"


async def use(model: OpenAIChatModel | OpenAIResponsesModel) -> None:
    agent = Agent(model, instructions="Be brief.", model_settings=SETTINGS, tools=[weather])
    first = await agent.run(ASKED)
    assert "42" in first.output, first.output
    assert first.usage.output_tokens > 0
    again = await agent.run("What is 1 + 2?", message_history=first.all_messages())
    assert again.output

    reader = Agent(model, output_type=NativeOutput(Person), model_settings=SETTINGS)
    assert (await reader.run(TEXT)).output == Person(name="Anna", age=34)
    async with reader.run_stream(TEXT) as stream:
        assert [each async for each in stream.stream_output()][-1].age == 34
    by_tool = Agent(model, output_type=ToolOutput(Person), model_settings=SETTINGS)
    assert (await by_tool.run(TEXT)).output.age == 34

    told: list[str] = []
    forced = SETTINGS | {"max_tokens": 90, "extra_body": {"structured_outputs": {"choice": [CALL]}}}
    caller = Agent(model, model_settings=forced, tools=[weather])
    async with caller.iter("How is Rome?") as run:
        async for node in run:
            if Agent.is_call_tools_node(node):
                told += [part.part_kind for part in node.model_response.parts]
                if len(told) == 2:
                    break
    assert told == ["tool-call", "tool-call"], "the answer to the first went back"


async def main() -> None:
    provider = OpenAIProvider(base_url=os.environ["BASE_URL"], api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        await use(kind("llada", provider=provider))


asyncio.run(main())
