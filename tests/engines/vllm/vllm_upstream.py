"""vLLM servers for the proxy: HTTP around stand-ins for the engine, which fail in every way that a test wants."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from functools import cache

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from serving_helpers import running_app
from vllm_stand_in import StandIn

from conftest import make_tokenizer, random_eraser, text_model
from kveraser.engines.vllm.proxy.app import ProxyAppOptions, create_proxy
from kveraser.engines.vllm.proxy.front import Front, ProxyOptions
from kveraser.errors import KVEraserError

MODEL = "tiny"
WINDOW, REPAIR = (2, 16), 4


@cache
def tiny_eraser():
    return random_eraser(text_model(), window=WINDOW, repair=REPAIR, choose="next")


def chat_text(messages, prompt=True):
    return make_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def ids_of(messages, prompt=True):
    """The ids that a server makes of messages."""
    return make_tokenizer().encode(chat_text(messages, prompt), add_special_tokens=False)


class Upstream:
    """One server.

    Attributes:
        chats: bodies of chat completions, as bytes, in the order in which they came; `headers` of them.
        prompts: ids of everything that the engine was asked to go on with.
        fails: on chats and completions: None, "status" (500), "event" (an error in place of the first token), "cut" (the
            connection ends in place of the first token), "late" (it ends after it), "edits" (what needs an edit fails), "erases"
            (the connection ends in the middle of what an erase is told).
        gate: streams wait for it before their second token.
    """

    def __init__(self, folder):
        self.engine = StandIn(folder, tiny_eraser(), list(WINDOW), REPAIR)
        self.chats, self.headers, self.fails, self.address = [], [], None, None
        self.renders = True
        self.paths = []
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.max_tokens = 4096

    @property
    def prompts(self):
        return [ids for ids in self.engine.prompts if len(ids) > 1]

    def complete(self, body):
        with self.lock:
            return self.engine.call("/v1/completions", body)

    def app(self):
        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            cards = self.engine.call("/v1/models")["data"]
            return {"data": [{**card, "max_model_len": self.max_tokens} for card in cards]}

        @app.post("/tokenize")
        async def tokenize(request: Request):
            return self.engine.call("/tokenize", await request.json())

        @app.post("/v1/chat/completions/render")
        async def render(request: Request):
            body = await request.json()
            if not self.renders:
                return JSONResponse({"error": {"message": "disabled"}}, 403)
            if self.renders == "otherwise":
                return {"prompt": body["messages"]}
            return {"token_ids": ids_of(body["messages"]), "features": None}

        @app.post("/v1/completions")
        async def complete(request: Request):
            if self.fails == "erases":
                return StreamingResponse(iter([b'{"choices": [']), headers={"content-length": "100"})
            try:
                return await asyncio.to_thread(self.complete, await request.json())
            except KVEraserError as error:
                return JSONResponse({"error": {"message": str(error)}}, 500)

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            raw = await request.body()
            self.chats.append(raw)
            self.headers.append(dict(request.headers))
            return await self._chat(json.loads(raw))

        async def noted(scope, receive, send):
            if scope["type"] == "http":
                self.paths.append(scope["path"])
            await app(scope, receive, send)

        return noted

    async def _chat(self, body):
        params = body.get("kv_transfer_params") or {}
        if not isinstance(body.get("messages"), list):
            return JSONResponse({"error": {"message": "messages: needed", "code": 400}}, 400)
        ids = params.pop("prompt_token_ids", None) or ids_of(body["messages"])
        fails = self.fails
        if fails == "edits":
            fails = ("event" if body.get("stream") else "status") if params else None
        if fails == "status":
            return JSONResponse({"error": {"message": "out of order", "code": 500}}, 500)
        if fails == "cut":
            return Response(b"", headers={"content-length": "7"}, media_type="application/json")
        asked = {**body, "prompt": ids, "max_tokens": body.get("max_tokens") or 4}
        try:
            text = (await asyncio.to_thread(self.complete, asked))["choices"][0]["text"]
        except KVEraserError as error:
            return JSONResponse({"error": {"message": str(error), "code": 500}}, 500)
        usage = {"prompt_tokens": len(ids), "completion_tokens": 4, "total_tokens": len(ids) + 4,
                 "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
            return {**head, "choices": [choice], "usage": usage, "kv_transfer_params": params or None}
        return StreamingResponse(self._events(head, text, usage, fails), media_type="text/event-stream")

    async def _events(self, head, text, usage, fails):
        def event(delta, reason=None):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

        yield event({"role": "assistant", "content": ""})
        if fails == "event":
            yield f"data: {json.dumps({'error': {'message': 'Internal server error', 'code': 500}})}\n\ndata: [DONE]\n\n"
            return
        yield event({"content": text[:1]})
        if fails == "late":
            raise ConnectionError("cut")
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        yield event({"content": text[1:]})
        yield event({}, "length")
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


class Proxy:
    """A running proxy, its address and its parts."""

    def __init__(self, address, front, ups):
        self.address, self.front, self.ups = address, front, ups

    def wait_until(self, true, seconds=60):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.01)


@contextmanager
def proxied(stores, *, keys=(), hosts=(), body_limit=1 << 20, **options):
    """A proxy in front of one server for each store, all of them in threads."""
    options = {"min_saved": 8, **options}
    ups = [Upstream(store) for store in stores]
    with running_all([up.app() for up in ups]) as addresses:
        for up, address in zip(ups, addresses, strict=True):
            up.address = address
        front = Front([*addresses], ProxyOptions(**options), make_tokenizer())
        with running_app(create_proxy(front, ProxyAppOptions(keys, body_limit, 60.0, hosts))) as address:
            proxy = Proxy(address, front, ups)
            proxy.wait_until(lambda: all(replica.max_tokens for replica in front.replicas.all))
            yield proxy


@contextmanager
def running_all(apps):
    if not apps:
        yield []
        return
    with running_app(apps[0]) as address, running_all(apps[1:]) as rest:
        yield [address, *rest]
