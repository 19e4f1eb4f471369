"""`X-Request-Id`: the client's own, or one it is given."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.server.process import ServerProcess

HEADER = "X-Request-Id"
PROMPT = {"prompt": "x", "max_tokens": 2}
COMPLETIONS = "/v1/completions"
TENSOR = {"name": "p", "datatype": "BYTES", "shape": [1], "data": ["x"]}


def test_the_clients_id_is_in_the_answer_and_in_the_log(
    http: httpx.Client, server: ServerProcess
) -> None:
    body = PROMPT | {"request_id": "from-the-body"}
    response = http.post(COMPLETIONS, json=body, headers={HEADER: "mine-17"})
    assert response.headers.get_list(HEADER) == ["mine-17"]
    assert response.json()["id"] == "cmpl-mine-17"
    assert "completion mine-17 200" in server.wait_for_line("mine-17")


def test_an_id_of_the_body_is_echoed_too(http: httpx.Client) -> None:
    response = http.post(COMPLETIONS, json=PROMPT | {"request_id": "from-the-body"})
    assert response.headers[HEADER] == "from-the-body"
    assert response.json()["id"] == "cmpl-from-the-body"


def test_a_request_without_one_is_given_one(http: httpx.Client) -> None:
    first, second = (http.post(COMPLETIONS, json=PROMPT) for _ in range(2))
    assert re.fullmatch(r"[0-9a-f]{32}", first.headers[HEADER])
    assert first.json()["id"] == f"cmpl-{first.headers[HEADER]}"
    assert first.headers[HEADER] != second.headers[HEADER]
    assert http.get("/health").headers[HEADER]


@pytest.mark.parametrize("given", ["y" * 5000, "a [31m\tb<c>", "\xe9\xff", ""])
def test_a_strange_id_is_made_harmless(http: httpx.Client, given: str) -> None:
    headers = {HEADER: given.encode("latin-1")}
    response = http.post(COMPLETIONS, json=PROMPT, headers=headers)
    assert re.fullmatch(r"[\w.:/+=@-]{1,64}", response.headers[HEADER], re.ASCII)
    assert response.json()["id"] == f"cmpl-{response.headers[HEADER]}"


def test_a_body_cannot_write_lines_into_log_or_headers(
    http: httpx.Client, server: ServerProcess
) -> None:
    forged = "z\r\nSet-Cookie: a=b\r\n2030-01-01 INFO forged"
    response = http.post(COMPLETIONS, json=PROMPT | {"request_id": forged})
    assert response.status_code == 200
    assert "Set-Cookie" not in response.headers
    assert response.headers[HEADER] == "z__Set-Cookie:_a=b__2030-01-01_INFO_forged"
    line = server.wait_for_line("forged")
    assert "completion z__Set" in line
    assert not [line for line in server.lines if line.startswith(("Set-Cookie", "2030"))]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETIONS, {"prompt": "x", "temperature": 9}, 400),
        (COMPLETIONS, {"prompt": "x", "model": "nope"}, 404),
        ("/v1/nope", {}, 404),
    ],
)
def test_a_refusal_has_the_id_in_its_header_and_its_line(
    http: httpx.Client, server: ServerProcess, path: str, body: dict, status: int
) -> None:
    given = f"refused-{status}-{len(body)}"
    response = http.post(path, json=body, headers={HEADER: given})
    assert (response.status_code, response.headers[HEADER]) == (status, given)
    assert f"{given} {status}: refused" in server.wait_for_line(given)


def test_kserves_protocols_have_it_too(http: httpx.Client, server: ServerProcess) -> None:
    for path, body in (
        ("/v1/models/tiny:predict", {"instances": ["x"]}),
        ("/v2/models/tiny/infer", {"inputs": [TENSOR]}),
    ):
        endpoint = path[1:3]
        headers = {HEADER: f"kserve-{endpoint}"}
        assert http.post(path, json=body, headers=headers).headers[HEADER] == headers[HEADER]
        assert server.wait_for_line(f"{endpoint} kserve-{endpoint} 200")
