"""Sessions over HTTP: what they do, whom they belong to, purging, many clients at once."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving_helpers import running, servers, tiny_service

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from files_helpers import readable_bytes
from kveraser.serving.sessions.comparing import Question, compare
from kveraser.serving.worker import Job

SECRET = "xylophone quartz"


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def create(server, key=None, *contents):
    name = server.call("POST", "/v1/sessions", key).json()["id"]
    for index, content in enumerate(contents):
        body = {"role": "tool", "content": content, "id": f"call-{index}"}
        assert server.call("POST", f"/v1/sessions/{name}/messages", key, json=body).status_code == 201
    return name


def test_a_session_does_what_a_context_does(serve):
    server = serve()
    name = create(server, None, "the code is 1234", "the car is blue and fast", "the door is fast")
    at = f"/v1/sessions/{name}"
    ctx = kv.ErasableContext(text_model(), make_tokenizer(), random_eraser(text_model()))
    for index, content in enumerate(["the code is 1234", "the car is blue and fast", "the door is fast"]):
        ctx.append_message("tool", content, id=f"call-{index}")

    def asked():
        reply = server.call("POST", f"{at}/generate", json={"prompt": "the code?", "max_tokens": 8}).json()
        return reply["text"], reply["kveraser"]["exact"]

    assert asked() == (ctx.generate("the code?", max_new_tokens=8), True)
    erased = server.call("DELETE", f"{at}/messages/call-0").json()
    receipt = ctx.erase("call-0")
    assert (erased["exact"], erased["spans"]) == (False, [[receipt.span.start, receipt.span.end]])
    assert asked() == (ctx.generate("the code?", max_new_tokens=8), False)
    shown = server.call("GET", at).json()
    assert [message["erased"] for message in shown["messages"]] == [True, False, False]
    assert "".join(run["text"] for run in shown["runs"] if run["state"] == "live") == ctx.text
    assert not shown["exact"]
    restored = server.call("POST", f"{at}/restore", json={"erase": erased["id"]}).json()
    assert restored["bit_exact"]
    erased = server.call("POST", f"{at}/erase", json={"text": " blue and", "method": "delete-and-shift"}).json()
    assert not erased["exact"]
    assert server.call("POST", f"{at}/repair").json()["exact"]
    assert server.call("GET", at).json()["exact"]
    assert server.call("POST", f"{at}/erase", json={"spans": erased["spans"]}).status_code == 400
    text = server.call("POST", f"{at}/text", json={"text": "more"}).json()
    assert text["span"][1] == server.call("GET", at).json()["tokens"]
    kept = server.call("POST", f"{at}/generate", json={"prompt": "go on", "max_tokens": 4, "keep": True})
    assert kept.status_code == 200
    assert server.call("GET", at).json()["tokens"] > text["span"][1]
    assert server.call("DELETE", at).json() == {"id": name, "deleted": True}
    assert server.call("GET", at).status_code == 404


def test_an_answer_within_a_session_can_be_streamed(serve):
    server = serve()
    at = f"/v1/sessions/{create(server, None, 'the code is 1234')}/generate"
    body = {"prompt": "the code?", "max_tokens": 20}
    plain = server.call("POST", at, json=body).json()
    streamed = server.call("POST", at, json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in streamed.split("\n\n") if line]
    events = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert "".join(event["text"] for event in events[:-1]) == plain["text"]
    assert events[-1]["prompt_tokens"] == plain["prompt_tokens"]
    assert events[-1]["kveraser"]["exact"] is True
    refused = server.call("POST", at, json={"prompt": " ", "stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "ContextError")


def test_a_message_id_that_is_not_there_is_never_taken_for_text(serve):
    server = serve()
    name = create(server, None, "the code is 1234", "the car")
    reply = server.call("DELETE", f"/v1/sessions/{name}/messages/1234")
    assert reply.status_code == 400
    assert "no message with id" in reply.json()["error"]["message"]
    assert server.call("POST", f"/v1/sessions/{name}/erase", json={"text": "call-0"}).status_code == 400
    assert server.call("POST", f"/v1/sessions/{name}/erase", json={"text": "a", "message": "b"}).status_code == 400


def test_another_key_sees_and_changes_no_session(serve):
    server = serve(keys=("alpha", "beta"))
    name = create(server, "alpha", "the code is 1234", "the car")
    at = f"/v1/sessions/{name}"
    assert server.call("GET", "/v1/sessions", "alpha").json()["data"] == [name]
    assert server.call("GET", "/v1/sessions", "beta").json()["data"] == []
    for method, path, body in (
        ("GET", at, None),
        ("DELETE", at, None),
        ("DELETE", f"{at}/messages/call-0", None),
        ("POST", f"{at}/messages", {"role": "user", "content": "x"}),
        ("POST", f"{at}/text", {"text": "x"}),
        ("POST", f"{at}/erase", {"message": "call-0"}),
        ("POST", f"{at}/restore", {"erase": "x"}),
        ("POST", f"{at}/purge", {"erase": "x"}),
        ("POST", f"{at}/repair", None),
        ("POST", f"{at}/generate", {"prompt": "x"}),
    ):
        reply = server.call(method, path, "beta", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
    assert server.call("GET", at, "alpha").status_code == 200


@pytest.mark.parametrize("how", ["at once", "steered and saved before", "later"])
def test_after_a_purge_the_secret_is_in_no_file_and_no_reply(serve, tmp_path, how):
    server = serve(state_dir=tmp_path / "state")
    name = create(server, None, "the car is blue", SECRET, "the door is fast")
    at = f"/v1/sessions/{name}"
    everything = lambda: readable_bytes(f for f in sorted(tmp_path.rglob("*")) if f.is_file())  # noqa: E731
    assert SECRET.encode() in everything()
    ids = make_tokenizer().encode(SECRET)
    if how == "at once":
        reply = server.call("DELETE", f"{at}/messages/call-1?purge=true&method=kveraser")
    elif how == "later":
        erased = server.call("DELETE", f"{at}/messages/call-1").json()
        assert server.call("POST", f"{at}/purge", json={"erase": "another"}).status_code == 400
        reply = server.call("POST", f"{at}/purge", json={"erase": erased["id"]})
        assert reply.json()["purged"]
    else:
        erased = server.call("DELETE", f"{at}/messages/call-1").json()
        server.call("POST", f"{at}/restore", json={"erase": erased["id"]})
        reply = server.call("POST", f"{at}/erase", json={"text": SECRET, "purge": True, "method": "delete-and-shift"})
    assert reply.status_code == 200
    assert reply.json()["exact"]
    shown = server.call("GET", at)
    assert SECRET not in shown.text
    assert shown.json()["exact"]
    server.service.close()
    written = everything()
    assert SECRET.encode() not in written
    import numpy as np

    assert np.asarray(ids, dtype=np.int64).tobytes() not in written
    again = serve(state_dir=tmp_path / "state")
    assert SECRET not in again.call("GET", at).text
    assert again.call("POST", f"{at}/generate", json={"prompt": "hello", "max_tokens": 3}).status_code == 200


def test_a_change_that_cannot_be_saved_is_not_made(serve, tmp_path, monkeypatch):
    server = serve(state_dir=tmp_path / "state")
    name = create(server, None, "the car is blue")
    before = server.call("GET", f"/v1/sessions/{name}").json()
    import kveraser.files

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(kveraser.files.os, "fsync", full)
    assert server.call("POST", f"/v1/sessions/{name}/text", json={"text": "more"}).status_code == 500
    monkeypatch.undo()
    assert server.call("GET", f"/v1/sessions/{name}").json() == before


def test_sessions_that_do_not_fit_into_memory_are_on_disk_and_come_back(serve):
    server = serve(cache_budget=100_000)
    names = [create(server, None, f"the code is {n} and the car is blue and it is fast") for n in range(6)]
    assert server.service.store.count[1] > 0
    for number, name in enumerate(names):
        assert f"the code is {number}" in server.call("GET", f"/v1/sessions/{name}").text
        assert server.service.store.bytes <= 100_000


def told_over_http(url, number):
    """What a client is told that works on a session of its own: messages, an erase, questions, undoing, repairing."""
    with httpx.Client(base_url=url, timeout=120) as client:

        def post(path, **body):
            return client.post(path, json=body).raise_for_status().json()

        at, told = f"/v1/sessions/{post('/v1/sessions')['id']}", []
        for turn in range(2):
            post(f"{at}/messages", role="tool", content=f"the code of {number} is {turn}", id=f"call-{turn}")
            told.append(post(f"{at}/generate", prompt="the code?", max_tokens=4)["text"])
        erase = post(f"{at}/erase", message="call-0")
        told += [answer["text"] for answer in post(f"{at}/compare", prompt="it", max_tokens=3)["answers"]]
        if number % 2:
            post(f"{at}/restore", erase=erase["id"])
        else:
            post(f"{at}/repair")
        told.append(post(f"{at}/generate", prompt="the code?", max_tokens=4)["text"])
        return told


def told_alone(number):
    """The same from a context of the library."""
    ctx, told = kv.ErasableContext(text_model(), make_tokenizer(), random_eraser(text_model())), []
    for turn in range(2):
        ctx.append_message("tool", f"the code of {number} is {turn}", id=f"call-{turn}")
        told.append(ctx.generate("the code?", max_new_tokens=4))
    receipt = ctx.erase("call-0")
    told += [answer.text for answer in compare(ctx, Question("it", 3), Job(lambda job: None, 60)).answers]
    if number % 2:
        ctx.restore(receipt)
    else:
        ctx.repair()
    return [*told, ctx.generate("the code?", max_new_tokens=4)]


def test_sixteen_clients_with_sessions_of_their_own_are_told_what_each_would_be_told_alone():
    budget = 400_000  # less than what they need: sessions go to disk and come back
    service, most = tiny_service(cache_budget=budget), []
    with running(service) as url, ThreadPoolExecutor(16) as pool:
        together = [pool.submit(told_over_http, url, number) for number in range(16)]
        while not all(each.done() for each in together):
            most.append(service.submit(lambda job: service.store.bytes).future.result(60))
            time.sleep(0.02)
        assert [each.result() for each in together] == [told_alone(number) for number in range(16)]
        assert 'status="5' not in httpx.get(f"{url}/metrics").text
        assert service.store.count[1] > 0
    assert max(most) <= budget
