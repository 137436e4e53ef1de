"""OpenAI's endpoints through the `openai` client, on a real server."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving_helpers import NAME, TALK, chat_ids, messages, running, tiny_service, without

from conftest import make_tokenizer


@pytest.fixture(scope="module")
def url():
    """A real server in a thread."""
    with running(tiny_service(cache_budget=1 << 22), "alpha", "beta") as address:
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
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert not any("usage" in c.model_fields_set for c in api.chat.completions.create(**body, stream=True))
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


def test_a_client_that_goes_away_from_a_request_without_a_body_leaves_the_queue():
    service = tiny_service(cache_budget=1 << 22)
    with running(service) as address:
        gate = threading.Event()
        service.submit(lambda job: gate.wait(30))
        for path in ("/v1/sessions", "/v1/sessions/none/repair"):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}{path}", timeout=0.3)
        deadline = time.monotonic() + 10
        while service.worker.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.worker.waiting == 0
        gate.set()
