"""Conversations for a server on a tiny random model."""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import httpx
import pytest
import torch
import uvicorn

from conftest import make_tokenizer, random_eraser, text_model
from kveraser.serving import decoding
from kveraser.serving.app import AppOptions, create_app
from kveraser.serving.completion import Prompt
from kveraser.serving.decoding import Sampling
from kveraser.serving.service import Service, ServiceOptions

NAME = "org/tiny"
PARTS = ("the code of the door is 1234, ", "no, the code is 99, ", "the car is blue and it is fast")
REAL = "smollm2-135m-instruct"


def messages(talk=None):
    """A conversation in OpenAI's JSON."""
    return [{"role": role, "content": content} for role, content in (TALK if talk is None else talk)]


TOOL_TEMPLATE = r"""
{%- if tools %}
    {{- '<s>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') + '# Tools' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n<tool_call></tool_call></s>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<s>system\n' + messages[0].content + '</s>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls and not m.reasoning_content) %}
        {{- '<s>' + m.role + '\n' + m.content + '</s>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<s>assistant' }}
        {%- if m.reasoning_content and loop.index0 > messages | length - 3 %}
            {{- '\n<think>\n' + m.reasoning_content + '\n</think>\n' }}
        {%- endif %}
        {%- if m.content %}{{- '\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '</s>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<s>user\n<tool_response>\n' + m.content + '\n</tool_response></s>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\n' }}{%- endif %}
"""
"""As Qwen's: with tools and calls, and what was thought shown for the last messages only."""


@lru_cache(maxsize=1)
def tool_tokenizer():
    """The tokenizer with a template that has tools."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


class Script:
    """Has a model say what it is told to: one text for each reply, the last one for all others."""

    def __init__(self, *texts):
        self.texts, self.told = texts, 0

    def decoding(self, sampling, tokenizer, ends, device):
        text = self.texts[min(self.told, len(self.texts) - 1)]
        self.told += 1
        ids = iter([*tokenizer.encode(text, add_special_tokens=False), *[tokenizer.eos_token_id] * 2])

        class Told(decoding.Decoding):
            def draw(self, logits):
                return super().draw(torch.nn.functional.one_hot(torch.tensor(next(ids)), len(logits)).float())

        return Told(replace(sampling, temperature=0.0), tokenizer, ends, device)


@pytest.fixture
def say(monkeypatch):
    """Sets what the model says from now on."""
    return lambda *texts: monkeypatch.setattr("kveraser.serving.service.Decoding", Script(*texts).decoding)


def chat_ids(messages):
    """A conversation as the ids that the server makes of it."""
    tokenizer = make_tokenizer()
    entries = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(entries, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


TALK = [
    ("system", "you are kind and the car is blue and the door is fast"),
    ("user", "what is the code of the door? look it up, it is in the list"),
    ("tool", "the code is 1234 and it is fast"),
    ("assistant", "the code of the door is 1234, the color of the car is blue and it is fast, and more of this"),
    ("tool", "the color of the car is blue, the color of the door is blue, the color of it is 1234, all of it is fast"),
    ("user", "and the color of the car?"),
]


def without(messages, *gone):
    return [message for index, message in enumerate(messages) if index not in gone]


def with_placeholder(messages, index, text="[cleared]"):
    return [(role, text if i == index else content) for i, (role, content) in enumerate(messages)]


def ask(service, messages, policy="exact", owner="", **sampling):
    """Send a conversation straight to an service."""
    sampling.setdefault("max_tokens", 8)
    wishes = {name: sampling.pop(name) for name in ("max_residual", "must_forget") if name in sampling}
    prompt = Prompt(owner, chat_ids(messages), policy, Sampling(**sampling), **wishes)
    service.check(prompt)
    return service.submit(lambda job: service.complete(prompt, job)).future.result(30)


def fresh(make_service, messages, **sampling):
    """The reply of a service that has never seen the conversation."""
    return ask(make_service(), messages, **sampling)


class Server:
    """A server in this process; `call` runs one request."""

    def __init__(self, keys=(), body_limit=1 << 20, hosts=(), body_seconds=60.0, tokenizer=None, **options):
        model = text_model()
        options.setdefault("cache_budget", 1 << 24)
        self.service = Service(model, tokenizer or make_tokenizer(), random_eraser(model), ServiceOptions(**options))
        self.app = create_app(self.service, AppOptions(NAME, keys, body_limit, body_seconds, hosts))

    def call(self, method, path, key=None, **options):
        headers = {**options.pop("headers", {}), **({"Authorization": f"Bearer {key}"} if key else {})}

        async def go():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(go())

    def chat(self, talk=None, key=None, **options):
        body = {"model": NAME, "messages": messages(talk), "max_tokens": 6, "temperature": 0, **options}
        return self.call("POST", "/v1/chat/completions", key, json=body)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(service, *keys, name=NAME):
    """A real server in a thread, which closes the service at the end; gives its URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(service, AppOptions(name, keys)), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def tiny_service(tokenizer=None, **options):
    """An service on a tiny random model."""
    model = text_model()
    return Service(model, tokenizer or make_tokenizer(), random_eraser(model), ServiceOptions(**options))


def event_list(text):
    """The events of a stream, which has to end as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def servers():
    """Makes servers, which are stopped at the end."""
    made = []
    try:
        yield lambda *args, **options: made.append(Server(*args, **options)) or made[-1]
    finally:
        for server in made:
            server.service.close()


@contextmanager
def services():
    """Makes services on a tiny random model, which are closed at the end."""
    made = []

    def make(**options):
        model = text_model()
        eraser = options.pop("eraser", random_eraser(model))
        options.setdefault("cache_budget", 1 << 24)
        made.append(Service(model, make_tokenizer(), eraser, ServiceOptions(**options)))
        return made[-1]

    try:
        yield make
    finally:
        for service in made:
            service.close()


@pytest.fixture
def make_service():
    """`services` for one test."""
    with services() as make:
        yield make


def settle(service):
    """Wait until there is nothing left to do in idle time."""
    deadline = time.monotonic() + 20
    while service.submit(lambda job: service.store.to_repair()).future.result(5) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def only_context(service):
    """The one context that a service holds."""
    (held,) = service.submit(lambda job: list(service.store._held.values())).future.result(5)
    return held


def newest_context(service):
    """The context that a service has used last."""
    return service.submit(lambda job: list(service.store._held.values())[-1]).future.result(5)


def session(server, *parts, key=None):
    """Where a new session is that has read some parts of a text."""
    name = server.call("POST", "/v1/sessions", key).json()["id"]
    for part in parts:
        assert server.call("POST", f"/v1/sessions/{name}/text", key, json={"text": part}).status_code == 201
    return f"/v1/sessions/{name}"
