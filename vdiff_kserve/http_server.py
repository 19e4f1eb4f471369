"""KServe's HTTP server with this project's routes, and the drain at its end."""

from __future__ import annotations

import asyncio
import logging
import time
from socket import socket
from types import FrameType

import uvicorn
from fastapi import APIRouter, FastAPI
from kserve import ModelServer
from kserve.protocol.rest.server import RESTServer, _RefreshingServer
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
from kserve.protocol.rest.v2_endpoints import V2Endpoints, register_v2_endpoints

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.http_protocol import BoundedHeads
from vdiff_kserve.model import DiffusionModel
from vdiff_kserve.openai import handlers
from vdiff_kserve.openai.document import describe
from vdiff_kserve.openai.guards import Access
from vdiff_kserve.openai.infer import InferenceRequest
from vdiff_kserve.openai.paths import PAGES
from vdiff_kserve.openai.routes import build_router, restart_router
from vdiff_kserve.ports import HTTP_ADVICE, ServerError, cannot_listen, listen

logger = logging.getLogger("kserve.vdiff.server")

FLUSH_SECONDS = 2
"""How long the last responses may take to reach their clients when the server stops."""


class HttpServer(RESTServer):  # type: ignore[misc]
    """KServe's REST server on the configured host, with this project's routes before KServe's.

    Args:
        server: whose port, models and repository it serves.
        access: lets requests in.
        model: what is drained at the end.
    """

    def __init__(
        self, server: ModelServer, access: Access, config: ServerConfig, model: DiffusionModel
    ) -> None:
        super().__init__(
            "kserve.model_server:app",
            server.dataplane,
            server.model_repository_extension,
            server.http_port,
            access_log_format=server.access_log_format,
            timeout_keep_alive=server.timeout_keep_alive,
            ssl_certfile=server.ssl_certfile,
            ssl_keyfile=server.ssl_keyfile,
        )
        self.config.host = config.host
        self.config.http = BoundedHeads
        self._default_model = config.model_name
        self._access = access
        self._max_body_bytes = config.max_body_bytes
        self._allowed_origins = config.allowed_origins
        self._open_paths = PAGES if server.enable_docs_url else ()
        self._restart = model.restart if config.enable_restart else None
        self._server = DrainingServer(self.config, model, config.grace_period)

    async def url(self) -> str:
        """Where the server listens, once it does."""
        await self._server.bound.wait()
        scheme = "https" if self.config.is_ssl else "http"
        host, port = self._server.address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def stopping(self) -> bool:
        """Whether the server is told to stop."""
        return self._server.should_exit or self._server.draining

    def close(self) -> None:
        """End the server."""
        self._server.should_exit = True

    def _register_endpoints(self, app: FastAPI) -> None:
        app.include_router(build_router(self.dataplane, self._default_model))
        if self._restart is not None:
            app.include_router(restart_router(self._restart))
        root = APIRouter()
        root.add_api_route("/", self.dataplane.live)
        app.include_router(root)
        register_v1_endpoints(app, self.dataplane, self.model_repository_extension)
        V2Endpoints.infer.__annotations__["request_body"] = InferenceRequest | bytes
        register_v2_endpoints(app, self.dataplane, self.model_repository_extension)
        describe(app)

    def _add_exception_handlers(self, app: FastAPI) -> None:
        super()._add_exception_handlers(app)
        handlers.install(
            app,
            self._default_model,
            self._access,
            self._max_body_bytes,
            self._allowed_origins,
            self._open_paths,
        )
        if self.access_log_format:
            from vdiff_kserve.openai import access_log  # needs a package that few install

            access_log.install(app, self.access_log_format)

    def _add_middlewares(self, app: FastAPI) -> None:
        """None of KServe's: they log two lines per request, and see no request that is refused by
        what stands before them."""


class DrainingServer(_RefreshingServer):  # type: ignore[misc]
    """A uvicorn server that, told to stop, first finishes what is running.

    The port stays open meanwhile, and new requests are refused with 503, so that a proxy sends them
    elsewhere. When the grace period is over, or at a second signal, what still runs is ended.
    """

    def __init__(self, config: uvicorn.Config, model: DiffusionModel, grace_period: float) -> None:
        super().__init__(config)
        self.bound = asyncio.Event()
        self._model = model
        self._grace_period = grace_period
        self._deadline: float | None = None
        self._told = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server is bound to."""
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        return host, port

    @property
    def draining(self) -> bool:
        """Whether a signal came."""
        return self._deadline is not None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Bind the port; the address `::` is for IPv4 too, as gRPC takes it.

        Raises:
            ServerError: it is taken, or there is no such address here.
        """
        host, port = self.config.host, self.config.port
        try:
            if host == "::":
                sockets = [listen(host, port)]
            await super().startup(sockets)
        except (OSError, SystemExit) as error:  # uvicorn's way to say so is SystemExit
            reason = error if isinstance(error, OSError) else error.__context__
            raise ServerError(cannot_listen("", host, port, reason, HTTP_ADVICE)) from error
        logger.info("Listening on %s port %d; the model is loading.", *self.address)
        self.bound.set()

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Begin to stop; the second time, without waiting."""
        first = self._deadline is None
        self._deadline = time.monotonic() + (self._grace_period if first else 0)
        self._model.refuse()

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave the main loop; called ten times a second."""
        if await super().on_tick(counter):
            return True
        if self._deadline is None:
            return False
        if not self._told:
            self._told = True
            logger.info(
                "Stopping; running requests (%d) may go on for %.0f seconds, new ones are refused. "
                "A second signal (Ctrl-C) ends them at once.",
                self._model.active,
                max(0.0, self._deadline - time.monotonic()),
            )
        if self._model.active and time.monotonic() < self._deadline:
            return False
        if self._model.active:
            logger.warning("Ending %d requests after the grace period.", self._model.active)
        await asyncio.to_thread(self._model.stop)
        self.config.timeout_graceful_shutdown = FLUSH_SECONDS
        return True
