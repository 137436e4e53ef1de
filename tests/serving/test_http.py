"""The HTTP surface: OpenAI's endpoints in process and through the `openai` client, keys, limits, errors, metrics."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving_helpers import NAME, TALK, chat_ids, messages, running, servers, tiny_engine, without

from conftest import make_tokenizer


@pytest.fixture
def serve():
    with servers() as make:
        yield make


@pytest.fixture(scope="module")
def url():
    """A real server in a thread."""
    with running(tiny_engine(cache_budget=1 << 22), "alpha", "beta") as address:
        yield address


def client(url, key="alpha"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_the_openai_client_gets_what_it_expects(url):
    api = client(url)
    assert [model.id for model in api.models.list()] == [NAME]
    assert api.models.retrieve(NAME).owned_by == "kveraser"
    reply = api.chat.completions.create(
        model=NAME, messages=messages(), max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    assert reply.usage.prompt_tokens == len(chat_ids(TALK))
    assert reply.usage.completion_tokens == len(reply.choices[0].logprobs.content) <= 5
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 2
    assert reply.kveraser["exact"] is True
    again = api.chat.completions.create(model=NAME, messages=messages(), max_tokens=5, temperature=0)
    assert again.choices[0].message.content == reply.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == reply.usage.prompt_tokens - 1


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "1"]}, {"temperature": 1.0, "seed": 5}, {"logprobs": True}])
def test_streaming_equals_not_streaming(url, options):
    api = client(url)
    body = {"model": NAME, "messages": messages(), "max_tokens": 12, "temperature": 0, **options}
    plain = api.chat.completions.create(**body)
    chunks = list(api.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert ends == [plain.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-1].kveraser["exact"] is True
    if options.get("logprobs"):
        tokens = [
            entry.token
            for c in chunks
            if c.choices and c.choices[0].logprobs
            for entry in c.choices[0].logprobs.content
        ]
        assert tokens == [entry.token for entry in plain.choices[0].logprobs.content]
    for stop in options.get("stop", ()):
        assert stop not in text


def test_text_completions_stream_and_take_ids(url):
    api = client(url)
    plain = api.completions.create(model=NAME, prompt="the code of", max_tokens=6, temperature=0, logprobs=1)
    ids = make_tokenizer().encode("the code of")
    by_ids = api.completions.create(model=NAME, prompt=ids, max_tokens=6, temperature=0)
    streamed = api.completions.create(model=NAME, prompt="the code of", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text == by_ids.choices[0].text
    assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens
    assert plain.choices[0].logprobs.text_offset[0] == 0


def test_dropping_a_middle_message_under_exact_is_a_fresh_prefill(url):
    api = client(url)
    body = {"model": NAME, "max_tokens": 8, "temperature": 0}
    api.chat.completions.create(messages=messages(), **body)
    dropped = api.chat.completions.create(messages=messages(without(TALK, 2)), **body)
    other = client(url, "beta").chat.completions.create(messages=messages(without(TALK, 2)), **body)
    assert other.kveraser["method"] == "prefill"  # nothing of the other key's
    assert dropped.choices[0].message.content == other.choices[0].message.content
    talk = [("system", "another one"), *TALK]
    api.chat.completions.create(messages=messages(talk), **body)
    steered = api.chat.completions.create(
        messages=messages(without(talk, 3)), extra_body={"kveraser": {"policy": "kveraser"}}, **body
    )
    assert steered.kveraser["method"] == "kveraser"
    assert steered.kveraser["exact"] is False


def test_sixteen_clients_at_once_get_the_serial_replies(url):
    talks = [[("user", f"{number} the code of the door")] for number in range(16)]

    def turns(number):
        api, talk, said = client(url, ("alpha", "beta")[number % 2]), list(talks[number]), []
        for turn in range(3):
            reply = api.chat.completions.create(model=NAME, messages=messages(talk), max_tokens=6, temperature=0)
            said.append(reply.choices[0].message.content)
            talk += [("assistant", said[-1] or "-"), ("user", f"and {turn}?")]
        return said

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(turns, range(16)))
    assert together == [turns(number) for number in range(16)]
    text = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer alpha"}).text
    assert "kveraser_prompt_tokens_total" in text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values["kveraser_cache_bytes"] <= values["kveraser_cache_budget_bytes"]
    assert not any('status="5' in name for name in values)


def test_a_client_that_goes_away_stops_the_work(url):
    api = client(url)
    stream = api.chat.completions.create(model=NAME, messages=messages(), max_tokens=5000, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    started = time.monotonic()
    api.chat.completions.create(model=NAME, messages=messages(), max_tokens=2, temperature=0)
    assert time.monotonic() - started < 5


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


def test_what_is_no_route_or_no_json_is_an_error_in_the_same_format(serve):
    server = serve()
    for reply in (
        server.call("GET", "/nowhere"),
        server.call("PUT", "/v1/models"),
        server.call("POST", "/v1/completions", content="{", headers={"content-type": "application/json"}),
    ):
        assert 400 <= reply.status_code < 500
        assert reply.json()["error"]["message"]


def test_long_requests_are_refused_also_when_they_hide_their_length(serve):
    server = serve(body_limit=2000)
    assert server.chat([("user", "a" * 3000)]).status_code == 413

    async def hidden():
        for _ in range(30):
            yield b" " * 100

    reply = server.call("POST", "/v1/completions", content=hidden(), headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_a_full_queue_is_answered_with_429_and_when_to_come_back(serve):
    server = serve(queue_size=1)
    gate = threading.Event()
    jobs = [server.engine.submit(lambda job: gate.wait(10))]
    while server.engine.worker.waiting:
        time.sleep(0.001)
    jobs.append(server.engine.submit(lambda job: None))
    reply = server.chat()
    gate.set()
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert server.chat(stream=True).status_code == 200


def test_a_request_that_takes_too_long_gets_408(serve):
    assert serve(timeout=0.05).chat(max_tokens=5000).status_code == 408


def test_web_pages_cannot_reach_a_local_server_under_a_name_of_their_own(serve):
    server = serve(hosts=("localhost",))
    assert server.call("GET", "/healthz").status_code == 400
    assert server.call("GET", "/healthz", headers={"host": "localhost:8000"}).status_code == 200


def test_no_prompt_reaches_a_log_not_even_with_a_mistake_of_ours(serve, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    server = serve()
    assert server.chat([("user", "xylophone quartz")]).status_code == 200

    def fail(*_):
        raise RuntimeError("xylophone quartz")

    monkeypatch.setattr(server.engine, "complete", fail)
    reply = server.chat([("user", "xylophone quartz")])
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "unexpected RuntimeError" in caplog.text
    assert "xylophone" not in caplog.text + reply.text


def test_the_openapi_document_names_every_route(serve):
    paths = serve().call("GET", "/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/healthz", "/metrics", "/v1/sessions",
            "/v1/sessions/{session_id}/compare", "/v1/examples", "/v1/methods"} <= set(paths)  # fmt: skip
