"""KServe's model server around one diffusion model: what it is made of, and its lifecycle."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import ssl
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from kserve import ModelServer

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.grpc_server import RpcServer
from vdiff_kserve.http_server import HttpServer
from vdiff_kserve.model import DiffusionModel
from vdiff_kserve.openai.dataplane import EngineDataPlane, FixedRepository, OpenRepository
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.guards import Access
from vdiff_kserve.ports import ServerError, check_ports

logger = logging.getLogger("kserve.vdiff.server")

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


def check_access_log(line_format: str | None) -> None:
    """Refuse a format of the access log that cannot be written.

    Raises:
        ServerError: it is no format, or the package that writes it is missing.
    """
    if not line_format:
        return
    if find_spec("asgi_logger") is None:
        raise ServerError(
            "--access_log_format needs the package asgi-logger: pip install 'vdiff-kserve[logging]'"
        )
    from vdiff_kserve.openai.access_log import check_format

    try:
        check_format(line_format)
    except ValueError as error:
        raise ServerError(f"--access_log_format {line_format} cannot be used: {error}") from error


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop of `--event-loop`; None makes asyncio's own.

    Raises:
        ServerError: uvloop is asked for and missing.
    """
    if name == "asyncio":
        return None
    if find_spec("uvloop") is None:
        if name == "uvloop":
            raise ServerError("--event-loop uvloop needs the package uvloop: pip install uvloop")
        return None
    import uvloop

    return uvloop.new_event_loop


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
        check_ports(self._config.host, self.http_port, grpc_port)
        with asyncio.Runner(loop_factory=loop_factory(self._config.kserve.event_loop)) as runner:
            runner.run(self._serve_until_signal(on_ready))

    async def _serve_until_signal(self, on_ready: Callable[[str], None]) -> None:
        rest = HttpServer(self, self.access, self._config, self._model)
        if self._config.replicas is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._restart_replicas)
        others = [asyncio.create_task(self._become_ready(rest, on_ready))]
        rpc = None
        if self.enable_grpc:
            rpc = RpcServer(self, self.access, self._config)
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
