"""KServe's OpenAI extension, without the package that KServe takes its protocol types from.

`kserve.protocol.rest.openai.types` imports request and response types from an inference engine that
this project neither needs nor wants. `install` puts a module of the same name and the same public
names in its place, made of this project's own types; KServe's `OpenAIGenerativeModel`,
`OpenAIDataPlane` and error classes then load as they are. KServe's `endpoints` module is not
used: `vdiff_kserve.openai.routes` registers the routes.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from vdiff_kserve.openai import protocol

MODULE = "kserve.protocol.rest.openai.types"
PARENT = "kserve.protocol.rest.openai"


class UnservedType(BaseModel):
    """Stands for a type of an endpoint that this server does not have (embeddings, rerank)."""

    model_config = ConfigDict(extra="allow")


class EmbeddingRequest(UnservedType):
    """A request to the embeddings endpoint, which is not served."""


class Embedding(UnservedType):
    """An answer of the embeddings endpoint, which is not served."""


class RerankRequest(UnservedType):
    """A request to the rerank endpoint, which is not served."""


class Rerank(UnservedType):
    """An answer of the rerank endpoint, which is not served."""


NAMES: dict[str, Any] = {
    "ChatCompletion": protocol.ChatCompletion,
    "ChatCompletionAssistantMessageParam": protocol.ChatMessageParam,
    "ChatCompletionChoice": protocol.ChatChoice,
    "ChatCompletionChunk": protocol.ChatCompletionChunk,
    "ChatCompletionContentPartParam": protocol.ContentPart,
    "ChatCompletionContentPartTextParam": protocol.ContentPart,
    "ChatCompletionLogProb": UnservedType,
    "ChatCompletionLogProbs": UnservedType,
    "ChatCompletionLogProbsContent": UnservedType,
    "ChatCompletionMessageParam": protocol.ChatMessageParam,
    "ChatCompletionRequest": protocol.ChatCompletionRequest,
    "ChatCompletionToolMessageParam": protocol.ChatMessageParam,
    "ChatMessage": protocol.ChatMessage,
    "ChoiceDelta": protocol.ChatDelta,
    "ChunkChoice": protocol.ChatChunkChoice,
    "Completion": protocol.Completion,
    "CompletionChoice": protocol.CompletionChoice,
    "CompletionChunk": protocol.CompletionChunk,
    "CompletionChunkChoice": protocol.CompletionChunkChoice,
    "CompletionLogProbs": UnservedType,
    "CompletionRequest": protocol.CompletionRequest,
    "ConversationMessage": protocol.ChatMessageParam,
    "CustomChatCompletionMessageParam": protocol.ChatMessageParam,
    "Embedding": Embedding,
    "EmbeddingCompletionRequest": EmbeddingRequest,
    "EmbeddingRequest": EmbeddingRequest,
    "EmbeddingResponseData": UnservedType,
    "Error": protocol.ErrorInfo,
    "ErrorResponse": protocol.ErrorResponse,
    "Model": protocol.ModelCard,
    "ModelList": protocol.ModelList,
    "Rerank": Rerank,
    "RerankRequest": RerankRequest,
    "UsageInfo": protocol.Usage,
}


def install() -> ModuleType:
    """Put the module in place; calling it again changes nothing.

    Raises:
        RuntimeError: KServe's own module was imported before.
    """
    existing = sys.modules.get(MODULE)
    if existing is not None:
        if getattr(existing, "ErrorResponse", None) is not protocol.ErrorResponse:
            raise RuntimeError(f"import vdiff_kserve.openai before {MODULE}")
        return existing
    module = ModuleType(MODULE, __doc__)
    module.__spec__ = ModuleSpec(MODULE, loader=None, origin=__file__)
    module.__package__ = PARENT
    vars(module).update(NAMES, __all__=sorted(NAMES))
    sys.modules[MODULE] = module
    return module
