"""The guards without a server: addresses, several rates at once, and bodies cut into pieces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.guards import Access, Guard, network_of, peer_address
from vdiff_kserve.openai.paths import endpoint_of, is_open
from vdiff_kserve.openai.request_ids import clean_id


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:51234", "10.0.0.7"),
        ("ipv6:[2001:db8::7]:51234", "2001:db8::7"),
        ("ipv6:%5B2001:db8::7%5D:51234", "2001:db8::7"),
    ],
)
def test_a_peer_of_grpc_is_counted_by_its_address(peer: str, address: str) -> None:
    assert peer_address(peer) == address


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8::7", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::7", "2001:db8::/64"),
        ("2001:db8:0:1::7", "2001:db8:0:1::/64"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("somewhere", "somewhere"),
        (None, "unknown"),
    ],
)
def test_addresses_of_one_subscriber_count_together(address: str | None, network: str) -> None:
    assert network_of(address) == network


async def statuses(access: Access, times: int, address: str, key: bytes = b"") -> list[int]:
    found = []
    for _ in range(times):
        try:
            await access.admit(b"Bearer " + key if key else None, address)
            found.append(200)
        except RequestError as error:
            found.append(error.status)
    return found


async def test_rates_hold_together_and_senders_are_kept_apart() -> None:
    access = Access((), ("5/day", "2/hour"))
    assert await statuses(access, 3, "10.0.0.1") == [200, 200, 429]
    assert await statuses(access, 1, "10.0.0.2") == [200]
    assert await statuses(Access((), ()), 50, "10.0.0.1") == [200] * 50


async def test_a_sender_is_told_when_the_window_ends() -> None:
    access = Access((), ("1/day",))
    assert await statuses(access, 1, "10.0.0.1") == [200]
    with pytest.raises(RequestError) as caught:
        await access.admit(None, "10.0.0.1")
    left = 86400 - time.time() % 86400
    assert abs(int(caught.value.headers["Retry-After"]) - left) < 10


async def test_a_key_is_counted_wherever_it_comes_from() -> None:
    access = Access(("a", "b"), ("2/day",))
    assert await statuses(access, 1, "10.0.0.1", b"a") == [200]
    assert await statuses(access, 2, "10.0.0.2", b"a") == [200, 429]
    assert await statuses(access, 1, "10.0.0.2", b"b") == [200]
    assert await statuses(access, 3, "10.0.0.2", b"c") == [401, 401, 429]


async def test_without_keys_whatever_is_sent_as_one_is_no_way_around_the_rate() -> None:
    access = Access((), ("2/day",))
    for key, status in ((b"a", 200), (b"b", 200), (b"c", 429)):
        assert await statuses(access, 1, "10.0.0.1", key) == [status]


def refuse(scope: Scope, error: RequestError) -> Response:
    return JSONResponse(error.message, error.status, error.headers)


async def through_guard(messages: Sequence[Message], most: int = 10) -> tuple[Any, int, int]:
    """What the application read of a body, the status, and how many messages were taken."""
    read: list[bytes] = []
    left = list(messages)
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            read.append(message["body"])
        await Response()(scope, receive, send)

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/x", "method": "POST", "headers": [], "client": None}
    await Guard(app, Access((), ()), most, refuse)(scope, receive, send)
    status = sent[0]["status"] if sent else 0
    return b"".join(read), status, len(messages) - len(left)


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_comes_whole_however_it_is_cut() -> None:
    assert await through_guard([piece(b"a"), piece(b""), piece(b"bc", more=False)]) == (
        b"abc", 200, 3,
    )  # fmt: skip
    assert await through_guard([piece(b"0123456789", more=False)]) == (b"0123456789", 200, 1)


async def test_nothing_is_read_beyond_the_limit() -> None:
    pieces = [piece(b"01234")] * 100
    assert await through_guard(pieces) == (b"", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, 3)


async def test_a_client_that_leaves_while_it_sends_is_not_answered() -> None:
    gone = {"type": "http.disconnect"}
    assert await through_guard([piece(b"a"), gone]) == (b"", 0, 2)


def test_only_probes_are_open() -> None:
    assert is_open("/v2/models/tiny/versions/1/ready")
    for path in ("/v2/models/a/b/ready", "/v2/models//ready", "/health/", "//health", "/Health",
                 "/metrics/x", "/v1/models/x/ready", "/health\n"):  # fmt: skip
        assert not is_open(path), path


def test_a_request_for_an_answer_belongs_to_an_endpoint() -> None:
    assert endpoint_of("POST", "/openai/v1/chat/completions") == "chat"
    assert endpoint_of("POST", "/v1/responses") == "responses"
    assert endpoint_of("POST", "/v1/responses/resp_1/cancel") is None
    assert endpoint_of("POST", "/v2/models/tiny/versions/1/infer") == "v2"
    for path in ("/v1/models/tiny:explain", "/v1/models", "/tokenize", "/v2/models/tiny/ready"):
        assert endpoint_of("POST", path) is None
    assert endpoint_of("GET", "/v1/completions") is None


def test_an_id_keeps_what_is_harmless() -> None:
    assert clean_id(" 7f-a_B.:/+=@9 ") == "7f-a_B.:/+=@9"
    assert clean_id("a\nb\x00c d\u00e9") == "a_b_c_d_"
    assert clean_id(None) == clean_id("   ") == ""
    assert len(clean_id("a" * 1000)) == 64


async def test_no_header_of_a_refusal_is_made_of_what_was_sent() -> None:
    with pytest.raises(RequestError) as caught:
        await Access(("a",), ()).admit(b"Bearer secret", "10.0.0.1")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert "secret" not in httpx.Headers(caught.value.headers).__repr__() + caught.value.message
