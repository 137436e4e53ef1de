"""Who is let in: keys, the length of a request, names of the server."""

from __future__ import annotations

import asyncio
import time

import pytest
from serving_helpers import servers

import kveraser as kv


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


@pytest.mark.parametrize("key", ["", " ", "ключ"])
def test_an_application_is_never_made_with_a_key_that_lets_everybody_in(serve, key):
    with pytest.raises(kv.OptionError, match="API key 1 of 1"):
        serve(keys=(key,))


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://testserver:3000"},
    {"origin": "http://testserver", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]
OWN = [{}, {"origin": "http://testserver"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_page_of_another_site_can_change_nothing_on_a_server_without_keys(serve, headers):
    server = serve()
    name = server.call("POST", "/v1/sessions").json()["id"]
    for method, path in (("POST", "/v1/sessions"), ("DELETE", f"/v1/sessions/{name}"), ("POST", "/v1/completions")):
        reply = server.call(method, path, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "cross_site_request")
    assert server.call("GET", "/v1/sessions").json()["data"] == [name]


@pytest.mark.parametrize("headers", OWN)
def test_the_servers_own_page_and_programs_are_let_in(serve, headers):
    assert serve().call("POST", "/v1/sessions", headers=headers).status_code == 201


def test_with_keys_the_key_alone_decides(serve):
    server = serve(keys=("alpha",))
    assert server.call("POST", "/v1/sessions", headers=FOREIGN[0]).status_code == 401
    assert server.call("POST", "/v1/sessions", "alpha", headers=FOREIGN[0]).status_code == 201


def test_a_body_that_is_never_sent_to_its_end_is_not_waited_for(serve):
    server = serve(body_seconds=0.2)

    async def half():
        yield b'{"model":'
        await asyncio.sleep(20)

    started = time.monotonic()
    reply = server.call("POST", "/v1/completions", content=half(), headers={"content-type": "application/json"})
    assert (reply.status_code, reply.headers["connection"]) == (408, "close")
    assert time.monotonic() - started < 10
    assert server.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/sessions"), ("GET", "/v1/sessions")])
def test_a_request_without_a_body_may_take_longer_than_a_body(serve, method, path):
    server = serve(body_seconds=0.05)
    server.service.submit(lambda job: time.sleep(0.8))
    assert server.call(method, path).status_code in (200, 201)
    server.service.submit(lambda job: time.sleep(0.8))
    assert server.chat(max_tokens=1).status_code == 200
