"""Who is let in: keys, the length of a request, names of the server."""

from __future__ import annotations

import pytest
from serving_helpers import servers


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def test_without_a_valid_key_nothing_is_told(serve):
    server = serve(keys=("alpha", "beta"))
    for path in ("/v1/models", "/metrics", "/v1/sessions"):
        for key in (None, "gamma", "alph", ""):
            reply = server.call("GET", path, key)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
    assert server.call("GET", "/healthz").status_code == 200
    assert server.call("GET", "/v1/models", "beta").status_code == 200
    assert server.chat().status_code == 401


def test_long_requests_are_refused_also_when_they_hide_their_length(serve):
    server = serve(body_limit=2000)
    assert server.chat([("user", "a" * 3000)]).status_code == 413

    async def hidden():
        for _ in range(30):
            yield b" " * 100

    reply = server.call("POST", "/v1/completions", content=hidden(), headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_web_pages_cannot_reach_a_local_server_under_a_name_of_their_own(serve):
    server = serve(hosts=("localhost",))
    assert server.call("GET", "/healthz").status_code == 400
    assert server.call("GET", "/healthz", headers={"host": "localhost:8000"}).status_code == 200
