"""What a program with OpenAI's agents does, over both of its protocols: answers, streams, objects,
tools."""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ASKED = "What is 17 + 25?"
TEXT = "Extract name and age as JSON: Anna is 34 years old."


class Person(BaseModel):
    """Someone with an age."""

    name: str
    age: int


@function_tool
def weather(city: str) -> str:
    """How the weather is."""
    return f"sunny in {city}"


async def use(model: OpenAIChatCompletionsModel | OpenAIResponsesModel) -> None:
    plain = ModelSettings(temperature=0, max_tokens=64, include_usage=True)
    agent = Agent(name="a", instructions="Be brief.", model=model, tools=[weather])
    agent.model_settings = plain
    whole = await Runner.run(agent, ASKED)
    assert "42" in whole.final_output, whole.final_output

    stream = Runner.run_streamed(agent, ASKED)
    kinds = [event.type async for event in stream.stream_events()]
    assert "raw_response_event" in kinds
    assert stream.final_output == whole.final_output
    assert stream.context_wrapper.usage.total_tokens == whole.context_wrapper.usage.total_tokens > 0

    reader = Agent(name="r", model=model, output_type=Person, tools=[weather], model_settings=plain)
    assert (await Runner.run(reader, TEXT)).final_output.age == 34

    forced = ModelSettings(max_tokens=90, extra_body={"structured_outputs": {"choice": [CALL]}})
    caller = Agent(name="c", model=model, tools=[weather], model_settings=forced)
    caller.tool_use_behavior = "stop_on_first_tool"
    assert (await Runner.run(caller, "How is Rome?")).final_output == "sunny in Rome"
    streamed = Runner.run_streamed(caller, "How is Rome?")
    async for _ in streamed.stream_events():
        pass
    assert streamed.final_output == "sunny in Rome"

    # The tool is required once; its answer goes back, and the model ends the run.
    once = ModelSettings(temperature=0, max_tokens=120, tool_choice="required")
    talker = Agent(name="t", model=model, tools=[weather], model_settings=once)
    done = await Runner.run(talker, "How is Rome?", max_turns=2)
    names = [type(item).__name__ for item in done.new_items]
    assert names[:2] == ["ToolCallItem", "ToolCallOutputItem"], names
    assert len(done.raw_responses) == 2


async def main() -> None:
    set_tracing_disabled(True)
    async with AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="none") as client:
        await use(OpenAIChatCompletionsModel("llada", client))
        await use(OpenAIResponsesModel("llada", client))


asyncio.run(main())
