"""Messages between a replica and its front end."""

from __future__ import annotations

import asyncio
import ipaddress
import pickle
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vdiff_kserve.distributed.channel import KERNEL_BYTES, LENGTH, Channel


class End:
    """One end, and what it was told."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.reasons: list[str] = []
        self.heard = asyncio.Event()
        self.writable = asyncio.Event()
        self.channel = Channel(self._receive, self._lost, self.writable.set)

    def _receive(self, message: Any) -> None:
        self.messages.append(message)
        self.heard.set()

    def _lost(self, reason: str) -> None:
        self.reasons.append(reason)
        self.heard.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.messages) < count and not self.reasons:
                self.heard.clear()
                await self.heard.wait()


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        one.setblocking(False)
        other.setblocking(False)
        yield one, other


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[End, End]]:
    """Two that speak to each other."""
    calls, called = End(), End()
    with connected() as (one, other):
        try:
            await asyncio.gather(
                calls.channel.begin(one, called=False), called.channel.begin(other, called=True)
            )
            yield calls, called
        finally:
            calls.channel.close()
            called.channel.close()
            await asyncio.sleep(0)


async def test_messages_arrive_in_order_both_ways() -> None:
    sent = [("some", number, b"x" * number) for number in range(200)]
    async with ends() as (one, other):
        for message in sent:
            one.channel.send(message)
            other.channel.send(message)
        await asyncio.gather(one.until(200), other.until(200))
        assert one.messages == other.messages == sent


async def test_a_message_is_larger_than_all_buffers() -> None:
    async with ends() as (one, other):
        one.channel.send(bytes(20 * KERNEL_BYTES))
        one.channel.send("behind it")
        await other.until(2)
        assert other.messages == [bytes(20 * KERNEL_BYTES), "behind it"]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
async def test_messages_are_found_in_pieces_of_any_size(size: int) -> None:
    sent = ["one", "", list(range(50)), "last"]
    bodies = [pickle.dumps(message) for message in sent]
    data = b"".join(LENGTH.pack(len(body)) + body for body in bodies)
    async with ends() as (one, _):
        for start in range(0, len(data), size):
            one.channel.data_received(data[start : start + size])
        assert one.messages == sent


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_slow_reader_stops_the_writer_and_loses_nothing(
    encrypted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if encrypted:
        write_authority(tmp_path, "ours")
        let_ray_encrypt(monkeypatch, tmp_path, "ours", "ours")
    async with ends() as (writer, reader):
        reader.channel._transport.pause_reading()
        piece, count = bytes(1 << 14), 0
        while writer.channel.is_writable:
            writer.writable.clear()
            writer.channel.send(piece)
            count += 1
            await asyncio.sleep(0)
        assert count * len(piece) <= 8 * KERNEL_BYTES
        assert not writer.writable.is_set()
        reader.channel._transport.resume_reading()
        await asyncio.wait_for(writer.writable.wait(), 10)
        assert writer.channel.is_writable
        await reader.until(count)
        assert reader.messages == [piece] * count


async def test_an_end_that_is_gone_is_told_once() -> None:
    async with ends() as (stays, leaves):
        leaves.channel.close()
        await stays.until(1)
        assert stays.reasons == ["its connection ended"]
        assert leaves.reasons == []
        assert not stays.channel.is_writable
        stays.channel.send("to nobody")
        stays.channel.close()
        assert len(stays.reasons) == 1


async def test_what_cannot_be_unpickled_ends_the_connection() -> None:
    async with ends() as (one, other):
        one.channel._transport.write(LENGTH.pack(3) + b"???" + LENGTH.pack(2) + b"??")
        await other.until(1)
        assert len(other.reasons) == 1
        assert "Error" in other.reasons[0]
        await one.until(1)
        assert one.reasons == ["its connection ended"]


async def test_nothing_is_received_behind_a_message_that_closes() -> None:
    received: list[str] = []
    body = pickle.dumps("the end")
    async with ends() as (_, other):
        other.channel._receive = lambda message: (received.append(message), other.channel.close())
        other.channel.data_received(2 * (LENGTH.pack(len(body)) + body))
        assert received == ["the end"]
        assert other.reasons == []


def write_authority(folder: Path, name: str) -> None:
    """A certificate authority and one certificate of it, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("10.1.2.3"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def let_ray_encrypt(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, trusted: str) -> None:
    """The environment that Ray reads."""
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(folder / f"{own}.pem"))
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(folder / f"{own}.key"))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(folder / f"{trusted}.pem"))


async def test_messages_are_encrypted_where_rays_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_authority(tmp_path, "ours")
    let_ray_encrypt(monkeypatch, tmp_path, "ours", "ours")
    async with ends() as (one, other):
        one.channel.send("a prompt")
        await other.until(1)
        assert other.messages == ["a prompt"]
        assert other.channel._transport.get_extra_info("cipher") is not None
        other.channel.send("a token")
        await one.until(1)
        assert one.messages == ["a token"]


async def test_certificates_of_strangers_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_authority(tmp_path, "ours")
    write_authority(tmp_path, "theirs")
    let_ray_encrypt(monkeypatch, tmp_path, "theirs", "ours")
    with pytest.raises(ssl.SSLError):
        async with ends():
            pass
