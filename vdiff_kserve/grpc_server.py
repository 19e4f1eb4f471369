"""KServe's gRPC server behind this project's guards."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from grpc import aio  # type: ignore[import-untyped]
from kserve import ModelServer
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
    add_GRPCInferenceServiceServicer_to_server,
)
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.http_server import FLUSH_SECONDS
from vdiff_kserve.observability.requests import count_refusal
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.guards import Access, RpcGuard
from vdiff_kserve.ports import GRPC_ADVICE, ServerError, cannot_listen

logger = logging.getLogger("kserve.vdiff.server")


class RpcServer(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server on the configured host.

    Args:
        server: whose port, models and repository it serves.
        access: lets requests in.
    """

    def __init__(self, server: ModelServer, access: Access, config: ServerConfig) -> None:
        super().__init__(
            server.grpc_port,
            server.dataplane,
            server.model_repository_extension,
            kwargs=vars(config.kserve),
            grace_period=FLUSH_SECONDS,
        )
        self._host = config.host
        self._model_name = config.model_name
        self._access = access

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
