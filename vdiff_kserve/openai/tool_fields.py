"""Functions that an answer may call: in requests, in messages, and in answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer


class FunctionDefinition(BaseModel):
    """A function that may be called; `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """One entry of `tools`; there are functions only."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(BaseModel):
    """A function by its name."""

    name: str


class NamedTool(BaseModel):
    """A `tool_choice` that is one function."""

    type: Literal["function"] = "function"
    function: FunctionName


class FunctionCall(BaseModel):
    """What is called: `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDelta(BaseModel):
    """A part of a call: its name, or further characters of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """A part of the call number `index`; `id`, `type` and the name come with the first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta

    @model_serializer
    def _without_absent(self) -> dict[str, Any]:
        told = {"index": self.index, "id": self.id, "type": self.type}
        function = {k: v for k, v in vars(self.function).items() if v is not None}
        return {k: v for k, v in told.items() if v is not None} | {"function": function}
