"""Ports that a server is about to listen on, tried before anything is loaded for it."""

from __future__ import annotations

import errno
import os
from socket import AF_INET, AF_INET6, create_server, has_dualstack_ipv6, socket

HTTP_ADVICE = "choose another address by --host and --port"
GRPC_ADVICE = "choose another by --grpc_port, or switch gRPC off by --enable_grpc false"


class ServerError(Exception):
    """The server cannot start; the message says why."""


def listen(host: str, port: int) -> socket:
    """A socket that listens; on the address `::` for IPv4 too, as gRPC takes it.

    Raises:
        OSError: the port is taken, or there is no such address here.
    """
    both = host == "::" and has_dualstack_ipv6()
    family = AF_INET6 if ":" in host else AF_INET
    return create_server((host, port), family=family, dualstack_ipv6=both)


def check_ports(host: str, port: int, grpc_port: int | None) -> None:
    """Refuse to start where another program listens: gRPC's library tells it less well.

    Args:
        port: of HTTP; 0 is always free.
        grpc_port: None without gRPC.

    Raises:
        ServerError: naming every port that cannot be listened on, and the option of each.
    """
    wanted = [("", port, HTTP_ADVICE)]
    if grpc_port is not None:
        wanted.append(("gRPC ", grpc_port, GRPC_ADVICE))
    problems = []
    for who, number, advice in wanted:
        try:
            listen(host, number).close()
        except OSError as error:
            problems.append(cannot_listen(who, host, number, error, advice))
    if problems:
        raise ServerError(". ".join(problems))


def cannot_listen(who: str, host: str, port: int, error: BaseException | None, advice: str) -> str:
    """The sentence about a port that cannot be listened on."""
    number = error.errno if isinstance(error, OSError) else None
    reason = str(error)
    if number is not None and number in errno.errorcode:  # Python and asyncio add words to these
        reason = os.strerror(number)
    reason = reason[:1].lower() + reason[1:]
    return f"{who}cannot listen on {host} port {port}: {reason}; {advice}"
