"""Tokenising and templating block neither the event loop nor the worker."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest
from serving_helpers import NAME, messages, servers, session

from kveraser.errors import QueueFullError
from kveraser.serving.beside import Beside


@pytest.fixture
def serve():
    with servers() as make:
        yield make


REQUESTS = {
    "/v1/chat/completions": {"model": NAME, "messages": messages(), "max_tokens": 2},
    "/v1/completions": {"model": NAME, "prompt": "the code", "max_tokens": 2},
}


@pytest.mark.parametrize(
    ("path", "slow"),
    [
        ("/v1/chat/completions", "apply_chat_template"),
        ("/v1/chat/completions", "encode"),
        ("/v1/completions", "encode"),
    ],
)
def test_the_server_answers_while_a_prompt_is_made(serve, monkeypatch, path, slow):
    server, order = serve(), []
    made = getattr(server.service.tokenizer, slow)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*args, **options):
        begun.set()
        go_on.wait(10)
        return made(*args, **options)

    monkeypatch.setattr(server.service.tokenizer, slow, slowly)

    async def go():
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:

            async def ask():
                order.append((await client.post(path, json=REQUESTS[path])).status_code)

            async def look():
                while not begun.is_set():
                    await asyncio.sleep(0.001)
                order.append((await client.get("/healthz")).json()["status"])
                go_on.set()

            await asyncio.gather(ask(), look())

    started = time.monotonic()
    asyncio.run(go())
    assert order == ["ok", 200]
    assert time.monotonic() - started < 9


def test_text_that_can_never_fit_is_refused_by_its_length_before_it_is_tokenised(serve, monkeypatch):
    server = serve(body_limit=64 << 20)
    at = session(server, "the code is 1234")
    long = "a" * (8 << 20)

    def never(*_, **__):
        raise AssertionError("tokenised")

    monkeypatch.setattr(server.service.tokenizer, "encode", never)
    monkeypatch.setattr(server.service.tokenizer, "apply_chat_template", never)
    talk = [{"role": "user", "content": long[: 4 << 20]}, {"role": "user", "content": long[: 4 << 20]}]
    for path, body, param in (
        ("/v1/chat/completions", {"model": NAME, "messages": talk}, "messages"),
        ("/v1/completions", {"model": NAME, "prompt": long}, "prompt"),
        (f"{at}/text", {"text": long}, None),
        (f"{at}/messages", {"role": "user", "content": long}, None),
        (f"{at}/generate", {"prompt": long}, None),
        (f"{at}/compare", {"prompt": long}, None),
    ):
        error = server.call("POST", path, json=body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param), path


def test_no_more_waits_than_may_and_what_fails_leaves_its_place():
    async def go():
        beside, gate = Beside(1), threading.Event()
        waiting = [asyncio.ensure_future(beside.run(lambda: gate.wait(10))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await beside.run(lambda: None)
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 3
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                await beside.run(lambda: 1 / 0)
        beside.stop()

    asyncio.run(go())
