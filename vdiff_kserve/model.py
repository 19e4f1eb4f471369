"""The model that KServe serves: a checkpoint, an engine, and the protocols over it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastapi import Request
from kserve import InferRequest, InferResponse, Model
from pydantic import BaseModel

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.tensor_parallel import load_sharded
from vdiff_kserve.engine import GenerationEngine
from vdiff_kserve.loading import LoadedModel
from vdiff_kserve.observability.metrics import forget_engine, model_loaded, watch_engine
from vdiff_kserve.observability.rounds import RoundMetrics
from vdiff_kserve.openai import OpenAIGenerativeModel
from vdiff_kserve.openai.errors import told_as_request_error, unavailable
from vdiff_kserve.openai.infer import OUTPUTS, infer_v2, predict_v1
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from vdiff_kserve.openai.request_ids import clean_id, new_id
from vdiff_kserve.openai.response_objects import ResponsesRequest
from vdiff_kserve.openai.service import GenerationService
from vdiff_kserve.openai.tokenizer_thread import TokenizerThread
from vdiff_kserve.openai.tokens import Tokens
from vdiff_kserve.setting import ConfigError

if TYPE_CHECKING:
    from vdiff_kserve.distributed.start import ReplicatedModel

logger = logging.getLogger("kserve.vdiff.model")

DRAIN_POLL_SECONDS = 0.05


class State(Enum):
    """Where the model is in its life."""

    LOADING = "The model is still loading."
    READY = "The model is ready."
    UNLOADED = "The model is not loaded."
    STOPPING = "The server is stopping and takes no new requests."
    STOPPED = "The server has stopped."


class DiffusionModel(Model, OpenAIGenerativeModel):  # type: ignore[misc]
    """A diffusion language model under KServe's V1, V2, gRPC and OpenAI protocols.

    KServe registers it at once; `start_engine` then loads the checkpoint on a thread of its own, so
    that probes are answered meanwhile. It is healthy once a warm-up answer succeeded.
    """

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config.model_name)
        self.engine = True
        self.ready = True
        self._config = config
        self._state = State.LOADING
        self._engine: GenerationEngine | None = None
        self._restart: Callable[[], None] | None = None
        self._loader: threading.Thread | None = None
        self._cut_short = False
        self._service: GenerationService | None = None
        self._tokens: Tokens | None = None
        self._change: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """False once the engine's loop died, and while it is stuck in a round."""
        engine = self._engine
        if engine is None or self._state is not State.READY:
            return True
        return engine.alive and not engine.stuck

    @property
    def loading(self) -> bool:
        """Whether a thread reads the checkpoint, or did when the model was stopped. It cannot be
        ended, and may start an engine that nobody ends."""
        return self._cut_short or (self._loader is not None and self._loader.is_alive())

    @property
    def not_ready_reason(self) -> str | None:
        """Why requests are refused; None when they are answered."""
        if self._state is not State.READY:
            return self._state.value
        if self._engine is None or not self._engine.alive:
            return "The model's engine has failed."
        if self._engine.stuck:
            return "The model's engine is stuck."
        return None if self._engine.ready else "No replica of the model is ready."

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a request; None before the model is loaded."""
        return self._service.limits.max_model_len if self._service else None

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return self._service.active if self._service else 0

    @property
    def tokens(self) -> Tokens:
        """The tokenizer, for clients.

        Raises:
            RequestError: the model is not loaded.
        """
        if self._tokens is None:
            raise unavailable(self._state.value)
        return self._tokens

    async def healthy(self) -> bool:
        """Whether requests are answered."""
        return self.not_ready_reason is None

    def load(self) -> bool:
        """KServe calls this for a model that is not healthy; loading belongs to `start_engine`."""
        return self.not_ready_reason is None

    def start(self) -> None:
        """KServe's hook before the servers start; there is nothing to do."""

    async def start_engine(self) -> None:
        """Load the checkpoint, start the engine and answer a warm-up request.

        Raises:
            CheckpointError: the checkpoint cannot be served.
            ConfigError: replicas are wanted, and there is no Ray for them.
        """
        if self._config.replicas is not None:
            self._service = await self._start_replicas()
        else:
            self._service = await self._load_here()
        if self._state is State.LOADING:
            self._state = State.READY

    async def _start_replicas(self) -> GenerationService:
        if find_spec("ray") is None:
            raise ConfigError("--replicas needs Ray: pip install 'vdiff-kserve[ray]'")
        from vdiff_kserve.distributed.start import start_replicas

        started = time.perf_counter()
        loaded = await start_replicas(self._config, RoundMetrics(self.name).observe)
        self._engine = loaded.engine
        self._restart = loaded.supervisor.restart
        watch_engine(self.name, loaded.engine)
        return self._service_of(loaded, started)

    async def _load_here(self) -> GenerationService:
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[GenerationService] = loop.create_future()

        def load() -> None:
            try:
                service = self._load()
            except BaseException as error:  # noqa: BLE001  raised again on the loop
                _tell(loop, loaded, error=error)
            else:
                _tell(loop, loaded, result=service)

        # Not the loop's executor: at exit Python waits for its threads, and a load can take long.
        self._loader = threading.Thread(target=load, name="vdiff-load", daemon=True)
        self._loader.start()
        return await loaded

    async def load_again(self) -> None:
        """Load a model that was unloaded; a model that is loaded stays as it is.

        Raises:
            RequestError: it fails, or the model is being loaded or unloaded, or the server stops.
        """
        if self._state is State.READY:
            return
        if self._state is not State.UNLOADED or self._is_changing:
            raise unavailable(self._state.value)
        self._state = State.LOADING
        await self._changed_by(self._load_again())

    async def unload(self) -> None:
        """Finish what runs, for `grace_period` seconds at most, and free the model's memory.

        Raises:
            RequestError: the model is not loaded.
        """
        if self._state is not State.READY or self._is_changing:
            raise unavailable(self._state.value)
        self._state = State.UNLOADED
        await self._changed_by(self._unload())

    @property
    def _is_changing(self) -> bool:
        return self._change is not None and not self._change.done()

    async def _changed_by(self, change: Coroutine[Any, Any, None]) -> None:
        """Loading and unloading go on when the client that asked for them leaves."""
        self._change = asyncio.create_task(change)
        await asyncio.shield(self._change)

    async def _load_again(self) -> None:
        with told_as_request_error():
            try:
                await self.start_engine()
            finally:
                if self._state is State.LOADING:
                    self._state = State.UNLOADED

    async def _unload(self) -> None:
        service, engine = self._service, self._engine
        assert service is not None
        assert engine is not None
        service.closed = State.UNLOADED.value
        deadline = time.monotonic() + self._config.grace_period
        while service.active and time.monotonic() < deadline:  # noqa: ASYNC110  as the server's end
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        await asyncio.to_thread(engine.stop)
        forget_engine(self.name)
        self._service = self._engine = self._tokens = self._restart = None
        logger.info("The model is unloaded.")

    def restart(self) -> None:
        """Replace the replicas, one after the other, while requests go on.

        Raises:
            RequestError: the model is not loaded, or has no replicas.
        """
        if self._restart is None or self._state is not State.READY:
            raise unavailable("There are no replicas to restart.")
        self._restart()

    def refuse(self) -> None:
        """Take no new requests; those that are running go on."""
        if self._state in (State.LOADING, State.READY, State.UNLOADED):
            self._state = State.STOPPING
            if self._service is not None:
                self._service.closed = State.STOPPING.value

    def stop(self) -> None:
        """End the engine; unfinished requests are told that the server stopped."""
        self.refuse()
        self._cut_short = self.loading
        if self._engine is not None and self._state is not State.STOPPED:
            self._engine.stop()
        self._state = State.STOPPED

    def stop_engine(self) -> None:
        """KServe's hook after `stop`."""
        self.stop()

    def _load(self) -> GenerationService:
        started = time.perf_counter()
        loaded = load_sharded(self._config, RoundMetrics(self.name).observe)
        self._engine = loaded.engine
        watch_engine(self.name, loaded.engine)
        loaded.warm_up()
        return self._service_of(loaded, started)

    def _service_of(
        self, loaded: LoadedModel | ReplicatedModel, started: float
    ) -> GenerationService:
        model_loaded(
            self.name,
            time.perf_counter() - started,
            family=loaded.spec.family,
            dtype=loaded.dtype,
            device=loaded.device,
            max_model_len=str(loaded.limits.max_model_len),
        )
        self._tokens = Tokens(TokenizerThread(loaded.tokenizer), loaded.limits)
        return GenerationService(
            loaded.engine, loaded.tokenizer, loaded.limits, self.name, loaded.grammars
        )

    def _ready_service(self) -> GenerationService:
        if self._service is None or self._state is not State.READY:
            raise unavailable(self._state.value)
        return self._service

    async def create_completion(
        self,
        request: CompletionRequest,
        raw_request: Request | None = None,  # noqa: ARG002  KServe's signature
        context: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> BaseModel | AsyncGenerator[str, None]:
        """Continue a prompt, or several.

        Raises:
            RequestError: the request cannot be answered.
        """
        return await self._ready_service().respond(request)

    async def create_chat_completion(
        self,
        request: ChatCompletionRequest,
        raw_request: Request | None = None,  # noqa: ARG002  KServe's signature
        context: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> BaseModel | AsyncGenerator[str, None]:
        """Answer a conversation.

        Raises:
            RequestError: the request cannot be answered.
        """
        return await self._ready_service().respond(request)

    async def create_response(
        self, request: ResponsesRequest
    ) -> BaseModel | AsyncGenerator[str, None]:
        """Answer a request to OpenAI's Responses API.

        Raises:
            RequestError: the request cannot be answered.
        """
        return await self._ready_service().create_response(request)

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,
        response_headers: Mapping[str, str] | None = None,  # noqa: ARG002  KServe's signature
    ) -> dict[str, Any] | InferResponse:
        """Answer KServe's V1 and V2 inference requests, over REST and gRPC.

        Raises:
            RequestError: the request cannot be answered.
        """
        request_id = clean_id((headers or {}).get("x-request-id")) or new_id()
        with told_as_request_error():
            service = self._ready_service()
            if isinstance(payload, InferRequest):
                return await infer_v2(payload, service, request_id)
            return await predict_v1(payload, service, request_id)

    def get_input_types(self) -> list[dict[str, Any]]:
        """V2 metadata: the input of `infer`."""
        return [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """V2 metadata: the outputs of `infer`."""
        return [{"name": k, "datatype": v, "shape": [-1]} for k, v in OUTPUTS.items()]


def _tell(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[GenerationService],
    result: GenerationService | None = None,
    error: BaseException | None = None,
) -> None:
    """Settle a future from another thread, unless nobody waits for it any more."""

    def settle() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
