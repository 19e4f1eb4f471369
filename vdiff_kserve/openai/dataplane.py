"""KServe's data plane over a model that loads in the background and has an engine of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import NoReturn, Protocol, runtime_checkable

from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.openai.dataplane import OpenAIDataPlane
from pydantic import BaseModel

from vdiff_kserve.openai.errors import RequestError, shorten, unavailable, unknown_model
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.tokens import Tokens


@runtime_checkable
class ServedModel(Protocol):
    """What the routes ask of a model."""

    name: str

    @property
    def alive(self) -> bool:
        """False once the model can never answer again."""
        ...

    @property
    def not_ready_reason(self) -> str | None:
        """Why the model cannot answer now; None when it can."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a request; None before the model is loaded."""
        ...

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        ...

    @property
    def tokens(self) -> Tokens:
        """The model's tokenizer, for clients. Only a ready model has one."""
        ...

    async def create_response(
        self, request: ResponsesRequest
    ) -> BaseModel | AsyncGenerator[str, None]:
        """Answer a request to the Responses API.

        Raises:
            RequestError: the request cannot be answered.
        """
        ...

    async def load_again(self) -> None:
        """Load a model that was unloaded.

        Raises:
            RequestError: it cannot be loaded now.
        """
        ...

    async def unload(self) -> None:
        """Finish what runs and free the model's memory.

        Raises:
            RequestError: it is not loaded.
        """
        ...


class EngineDataPlane(OpenAIDataPlane):  # type: ignore[misc]
    """Serves KServe's V1, V2, gRPC and OpenAI protocols.

    It differs from KServe's own in three points: a model that is not ready is refused, never loaded
    on the event loop; the server is live only while its engine is; it is ready only when its model
    is.
    """

    async def get_model(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            RequestError: there is none (404), or it is not ready (503).
        """
        known = self.model_registry.get_models()
        if name not in known:
            raise unknown_model(name, tuple(known))
        model: ServedModel = known[name]
        if (reason := model.not_ready_reason) is not None:
            raise unavailable(reason)
        return model

    async def model_ready(
        self,
        model_name: str,
        disable_predictor_health_check: bool = False,  # noqa: ARG002  KServe's
    ) -> bool:
        """Whether the model of that name answers.

        Raises:
            RequestError: there is none.
        """
        known = self.model_registry.get_models()
        if model_name not in known:
            raise unknown_model(model_name, tuple(known))
        return known[model_name].not_ready_reason is None

    async def live(self) -> dict[str, str]:
        """KServe's liveness: `alive` unless an engine died."""
        return {"status": "alive" if all(m.alive for m in self._models()) else "dead"}

    async def ready(self) -> bool:
        """Whether every model can answer."""
        models = self._models()
        return bool(models) and all(m.not_ready_reason is None for m in models)

    @property
    def active(self) -> int:
        """Requests that are being answered; a model with several names counts once."""
        return sum(model.active for model in {id(m): m for m in self._models()}.values())

    def _models(self) -> list[ServedModel]:
        return list(self.model_registry.get_models().values())


class FixedRepository(ModelRepositoryExtension):  # type: ignore[misc]
    """A model repository that clients cannot change: anyone who reaches the port could otherwise
    unload the model, over REST and gRPC alike."""

    async def load(self, model_name: str) -> NoReturn:
        """Refuse."""
        raise _fixed(model_name)

    async def unload(self, model_name: str) -> NoReturn:
        """Refuse."""
        raise _fixed(model_name)


class OpenRepository(ModelRepositoryExtension):  # type: ignore[misc]
    """A model repository whose models clients load and unload, over REST and gRPC alike.

    An unloaded model keeps its names: requests for it are refused until it is loaded again.
    """

    async def load(self, model_name: str) -> None:
        """Load a model that was unloaded.

        Raises:
            RequestError: there is none of that name, or it cannot be loaded now.
        """
        await self._model(model_name).load_again()

    async def unload(self, model_name: str) -> None:
        """Free a model's memory once what runs is finished.

        Raises:
            RequestError: there is none of that name, or it is not loaded.
        """
        await self._model(model_name).unload()

    def _model(self, name: str) -> ServedModel:
        known = self._model_registry.get_models()
        if name not in known:
            raise unknown_model(name, tuple(known))
        model: ServedModel = known[name]
        return model


def _fixed(model_name: str) -> RequestError:
    return RequestError(
        f"The models of this server are fixed; requests do not load or unload "
        f"`{shorten(model_name)}` unless it is started with --enable_repository_control true.",
        status=HTTPStatus.FORBIDDEN,
    )
