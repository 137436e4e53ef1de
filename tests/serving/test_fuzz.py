"""Requests generated from the server's own OpenAPI document never make it fail."""

from __future__ import annotations

import atexit
from collections import Counter
from contextlib import asynccontextmanager

import schemathesis
from hypothesis import settings
from serving_helpers import NAME, Server, tool_tokenizer


@asynccontextmanager
async def _forever():
    yield


_server = Server(timeout=60, max_reply=4, tokenizer=tool_tokenizer())
atexit.register(_server.service.close)
_session = _server.call("POST", "/v1/sessions").json()["id"]
_server.call("POST", f"/v1/sessions/{_session}/messages", json={"role": "user", "content": "the code is 1", "id": "a"})
_server.app.router.lifespan_context = lambda _: _forever()  # every call starts and stops the application
schema = schemathesis.openapi.from_dict(_server.app.openapi())
schema.app = _server.app


_tried = Counter()


@schema.parametrize()
@settings(max_examples=12, deadline=None)
def test_no_request_makes_the_server_fail(case):
    _tried[case.path] += 1
    if _tried[case.path] > 60 and _tried[case.path] % 10:  # bodies with many fields get a thousand cases
        return
    deletes_it = case.method.upper() == "DELETE" and case.path.endswith("{session_id}")  # tried with ids of no session
    if "session_id" in (case.path_parameters or {}) and not deletes_it:
        case.path_parameters["session_id"] = _session
    if isinstance(case.body, dict):
        for message in case.body["messages"] if isinstance(case.body.get("messages"), list) else ():
            if isinstance(message, dict):  # else few conversations get as far as the model
                message["content"] = message.get("content") or "a"
                message.pop("tool_call_id", None)
        if "model" in case.body:
            case.body["model"] = NAME
        if isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 4)
        if isinstance(case.body.get("max_completion_tokens"), int):
            case.body["max_completion_tokens"] = min(case.body["max_completion_tokens"], 4)
    response = case.call(timeout=60)  # of a busy machine; how fast it answers is not asked here
    assert response.status_code < 500
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
