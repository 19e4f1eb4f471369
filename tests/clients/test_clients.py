"""Client programs, in the versions of `clients.toml`, against the embedded model's server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.clients.install import HERE, VERSIONS, node_modules, python_with
from tests.server.process import ServerProcess

EMBEDDED = HERE.parents[1] / "vdiff_kserve" / "embedded"
QUESTION = "What is 17 + 25?"
TEXT = "Extract name and age as JSON: Anna is 34 years old."
LIMIT_S = 600


class Person(BaseModel):
    """Someone with an age."""

    name: str
    age: int


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Its template takes no tools, and its context has no room for them."""
    options = ("--model_name", "llada", "--enable_grpc", "false", "--no_tools_in_prompt")
    with ServerProcess(*options) as process:
        yield process.wait_until_ready()


def run(server: ServerProcess, *command: str | Path, folder: Path | None = None) -> str:
    """What a client's script wrote; it fails when something was not as it should be."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"BASE_URL": f"{server.url}/v1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def langchain(server: ServerProcess, **options: object) -> ChatOpenAI:
    return ChatOpenAI(
        model="llada", base_url=f"{server.url}/v1", api_key="none", max_retries=0,
        temperature=0, max_tokens=64, **options,
    )  # fmt: skip


def test_langchain_chats(server: ServerProcess) -> None:
    chat = langchain(server)
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert isinstance(answer, AIMessage)
    assert answer.text
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["input_tokens"]
    assert "42" in chat.invoke(QUESTION).text


async def test_langchain_streams_the_same_text(server: ServerProcess) -> None:
    chat = langchain(server, stream_usage=True)
    whole = chat.invoke(QUESTION)
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum(chunks[1:], chunks[0]).usage_metadata == whole.usage_metadata
    assert "".join([chunk.text async for chunk in chat.astream(QUESTION)]) == whole.text
    batch = chat.batch([QUESTION, "What is 3 + 4?"])
    assert batch[0].text == whole.text


def test_langchain_sends_the_servers_own_fields(server: ServerProcess) -> None:
    chat = langchain(server, extra_body={"policy": "threshold", "threshold": 0.9})
    assert "42" in chat.invoke(QUESTION).text
    with pytest.raises(BadRequestError, match="threshold"):
        langchain(server, extra_body={"threshold": 7}).invoke(QUESTION)


def test_langchain_uses_the_responses_api(server: ServerProcess) -> None:
    chat = langchain(server, use_responses_api=True)
    plain = langchain(server).invoke(QUESTION)
    assert chat.invoke(QUESTION).text == plain.text
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == plain.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_gets_objects(
    server: ServerProcess, method: str, use_responses_api: bool
) -> None:
    chat = langchain(server, use_responses_api=use_responses_api)
    person = chat.with_structured_output(Person, method=method).invoke(TEXT)
    assert isinstance(person, Person)
    assert person.age == 34


def test_langchain_calls_tools(server: ServerProcess) -> None:
    chat = langchain(server).bind_tools([Person], tool_choice="Person")
    (call,) = chat.invoke(TEXT).tool_calls
    assert call["name"] == "Person"
    assert call["args"]["age"] == 34
    chunks = list(chat.stream(TEXT))
    (streamed,) = sum(chunks[1:], chunks[0]).tool_calls
    assert streamed["args"] == call["args"]


def test_the_responses_api_parses_objects(server: ServerProcess) -> None:
    asked = dict(model="llada", input=TEXT, text_format=Person, max_output_tokens=64)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert client.responses.parse(**asked).output_parsed.age == 34
        with client.responses.stream(**asked) as stream:
            assert stream.get_final_response().output_parsed.age == 34


def test_the_page_tells_the_versions_that_are_tested() -> None:
    page = (HERE.parents[1] / "docs/api.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w-]+)`(?: for Node)? \| ([\d.]+) \|", page, re.MULTILINE))
    clients = tomllib.loads(VERSIONS.read_text(encoding="utf-8")).values()
    pinned = [each for client in clients for each in client["requires"]]
    node = json.loads((HERE / "node/package-lock.json").read_text(encoding="utf-8"))["packages"]
    pinned += [f"{name}=={node[f'node_modules/{name}']['version']}" for name in ("openai", "ai")]
    for name, version in (re.sub(r"\[.*?\]", "", each).split("==") for each in pinned):
        assert told[name] == version


@pytest.mark.slow
@pytest.mark.parametrize("client", ["instructor", "litellm", "openai_agents", "pydantic_ai"])
def test_a_library(server: ServerProcess, client: str) -> None:
    run(server, python_with(client), HERE / f"{client}_client.py")


@pytest.mark.slow
@pytest.mark.parametrize("client", ["lm_eval", "guidellm"])
def test_an_evaluation_program(server: ServerProcess, tmp_path: Path, client: str) -> None:
    script = HERE / f"{client}_client.py"
    run(server, python_with(client), script, tmp_path, EMBEDDED, folder=tmp_path)


@pytest.mark.slow
def test_multiple_choice_tasks(server: ServerProcess, tmp_path: Path) -> None:
    script = HERE / "lm_eval_choices_client.py"
    run(server, python_with("lm_eval"), script, tmp_path, EMBEDDED, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["client.mjs", "ai_sdk.mjs"])
def test_a_library_for_node(server: ServerProcess, script: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("needs Node and npm")
    run(server, "node", script, folder=node_modules())
