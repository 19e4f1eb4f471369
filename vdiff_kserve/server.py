"""KServe's model server around one diffusion model: its address, its lifecycle and its end."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from types import FrameType

import uvicorn
from fastapi import APIRouter, FastAPI
from grpc import aio  # type: ignore[import-untyped]
from kserve import ModelServer
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
    add_GRPCInferenceServiceServicer_to_server,
)
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import RESTServer, _RefreshingServer
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
from kserve.protocol.rest.v2_endpoints import V2Endpoints, register_v2_endpoints

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.http_protocol import BoundedHeads
from vdiff_kserve.model import DiffusionModel
from vdiff_kserve.observability.requests import count_refusal
from vdiff_kserve.openai import handlers
from vdiff_kserve.openai.dataplane import EngineDataPlane, FixedRepository, OpenRepository
from vdiff_kserve.openai.document import describe
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.guards import Access, RpcGuard
from vdiff_kserve.openai.infer import InferenceRequest
from vdiff_kserve.openai.paths import PAGES
from vdiff_kserve.openai.routes import build_router, restart_router
from vdiff_kserve.ports import (
    GRPC_ADVICE,
    HTTP_ADVICE,
    ServerError,
    cannot_listen,
    check_ports,
    listen,
)

logger = logging.getLogger("kserve.vdiff.server")

FLUSH_SECONDS = 2
"""How long the last responses may take to reach their clients when the server stops."""


OPEN_FILES = 65_536
"""As many as any number of clients needs: each connection is one."""


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Refuse files that TLS could not begin with, before a model is loaded for nothing.

    Raises:
        ServerError: naming the option at fault.
    """
    if key and not certificate:
        raise ServerError("--ssl_keyfile needs --ssl_certfile")
    for option, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        if path and not Path(path).is_file():
            raise ServerError(f"--{option} must be a file that exists, got {path!r}")
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(certificate, key)
        except ssl.SSLError as error:
            raise ServerError(
                f"--ssl_certfile {certificate} and its key cannot be used: {error.reason or error}"
            ) from error


def allow_connections(most: int = OPEN_FILES) -> None:
    """Raise the process's limit of open files, connections among them, as far as it may itself:
    shells and services often begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_access_log(log_format: str | None) -> None:
    """Refuse a format of the access log when the package that writes it is missing.

    Raises:
        ServerError: it is.
    """
    if log_format and find_spec("asgi_logger") is None:
        raise ServerError(
            "--access_log_format needs the package asgi-logger: pip install 'kserve[logging]'"
        )


def warn_of_slashes(names: Sequence[str]) -> None:
    """Say so when no name of the model fits into a path of V1 and V2."""
    if all("/" in name for name in names):
        logger.warning(
            "KServe's V1 and V2 paths cannot hold the slash of %s; OpenAI's routes and gRPC do. "
            "A name without one can be added by --served_model_name.",
            names[0],
        )


class Server(ModelServer):  # type: ignore[misc]
    """Serves one model until a signal ends it.

    KServe's parts, assembled with the configured address, this project's OpenAI routes, and a
    shutdown that drains before it closes the port.

    Raises:
        ServerError: the certificate or its key cannot be used, or a package is missing.
    """

    def __init__(self, config: ServerConfig, model: DiffusionModel) -> None:
        config.apply_to_kserve()
        options = config.kserve
        super().__init__(
            http_port=config.port,
            grpc_port=options.grpc_port,
            max_threads=options.max_threads,
            enable_grpc=options.enable_grpc,
            enable_docs_url=options.enable_docs_url,
            enable_latency_logging=options.enable_latency_logging,
            access_log_format=options.access_log_format,
            timeout_keep_alive=options.timeout_keep_alive,
            grace_period=config.grace_period,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
        check_certificate(self.ssl_certfile, self.ssl_keyfile)
        check_access_log(self.access_log_format)
        self.dataplane = EngineDataPlane(self.registered_models)
        repository = OpenRepository if config.enable_repository_control else FixedRepository
        self.model_repository_extension = repository(self.registered_models)
        self.access = Access(config.api_key, config.rate_limit)
        self._config = config
        self._model = model
        model.enable_latency_logging = self.enable_latency_logging
        for name in config.served_names:
            self.register_model(model, name)
        warn_of_slashes(config.served_names)

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve until a signal comes and the running requests are done.

        Args:
            on_ready: called with the server's URL once the model answers.

        Raises:
            CheckpointError: the model cannot be loaded.
            ServerError: the address or a port cannot be listened on.
        """
        allow_connections()
        grpc_port = self.grpc_port if self.enable_grpc else None
        check_ports(self._config.host, self._config.port, grpc_port)
        asyncio.run(self._serve_until_signal(on_ready))

    async def _serve_until_signal(self, on_ready: Callable[[str], None]) -> None:
        rest = HttpServer(self, self._config, self._model)
        if self._config.replicas is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._restart_replicas)
        others = [asyncio.create_task(self._become_ready(rest, on_ready))]
        rpc = None
        if self.enable_grpc:
            rpc = RpcServer(self, self._config)
            others.append(asyncio.create_task(rpc.start(self.max_threads)))
        failures: list[BaseException] = []

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            # What fails once the server stops fails because it stops.
            if error is not None and not rest.stopping:
                failures.append(error)
                rest.close()

        for task in others:
            task.add_done_callback(ended)
        try:
            await rest.start()
        finally:
            if rpc is not None:
                await rpc.stop()
            await asyncio.to_thread(self._model.stop)
            for task in others:
                task.cancel()
        if failures:
            raise failures[0]

    def _restart_replicas(self) -> None:
        try:
            self._model.restart()
        except RequestError as error:
            logger.warning("SIGHUP: %s", error.message)

    async def _become_ready(self, rest: HttpServer, on_ready: Callable[[str], None]) -> None:
        await self._model.start_engine()
        on_ready(await rest.url())


class HttpServer(RESTServer):  # type: ignore[misc]
    """KServe's REST server on the configured host, with this project's routes before KServe's."""

    def __init__(self, server: Server, config: ServerConfig, model: DiffusionModel) -> None:
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
        self._access = server.access
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

    def _add_middlewares(self, app: FastAPI) -> None:
        """KServe's middleware logs two lines per request; it comes with its access log only."""
        if self.access_log_format:
            super()._add_middlewares(app)


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


class RpcServer(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server on the configured host."""

    def __init__(self, server: Server, config: ServerConfig) -> None:
        super().__init__(
            server.grpc_port,
            server.dataplane,
            server.model_repository_extension,
            kwargs=vars(config.kserve),
            grace_period=FLUSH_SECONDS,
        )
        self._host = config.host
        self._model_name = config.model_name
        self._access = server.access

    def _count(self, method: str, error: RequestError) -> None:
        if method == "ModelInfer" and not error.counted:
            count_refusal(self._model_name, "v2", error.status, error)

    async def start(self, max_workers: int) -> None:
        """Serve until `stop`.

        Raises:
            ServerError: the port is taken.
        """
        self._server = aio.server(
            ThreadPoolExecutor(max_workers=max_workers),
            interceptors=(
                ExceptionToStatusInterceptor(),
                RpcGuard(self._access, self._count),
            ),
            options=[
                ("grpc.so_reuseport", 0),  # else a taken port is shared with its owner
                *(
                    (f"grpc.{name}", self._kwargs[f"grpc_{name}"])
                    for name in ("max_send_message_length", "max_receive_message_length")
                ),
            ],
        )
        servicer = InferenceServicer(self._data_plane, self._model_repository_extension)
        add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._port}")
        except RuntimeError as error:
            raise ServerError(
                cannot_listen("gRPC ", self._host, self._port, error, GRPC_ADVICE)
            ) from error
        await self._server.start()
        logger.info("gRPC listens on %s port %d.", self._host, port)
        await self._server.wait_for_termination()
