"""What a request to OpenAI's endpoints may ask for, and what is refused."""

from __future__ import annotations

import json

import pytest
from serving_helpers import NAME, messages, servers


@pytest.fixture
def serve():
    with servers() as make:
        yield make


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "other"}, 404, "no model"),
        ({"messages": []}, 400, "messages"),
        ({"n": 2}, 400, "n:"),
        ({"tools": [{}]}, 400, "tools"),
        ({"temperature": 9}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 20_000}, 400, "context length"),
        ({"top_logprobs": 3}, 400, "logprobs"),
        ({"stop": [""]}, 400, "stop"),
        ({"kveraser": {"policy": "magic"}}, 400, "policy"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    ],
)
def test_bad_requests_are_refused_in_openais_format(serve, changes, status, words):
    body = {"model": NAME, "messages": messages(), "max_tokens": 2, **changes}
    headers = {"content-type": "application/json"}
    server = serve()
    for streamed in (False, True):
        text = json.dumps({**body, "stream": streamed})
        reply = server.call("POST", "/v1/chat/completions", content=text, headers=headers)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert words in reply.json()["error"]["message"]
