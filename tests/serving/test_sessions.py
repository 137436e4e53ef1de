"""Explicit sessions over HTTP: what they do, whom they belong to, purging, kill -9, and random sequences of operations."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from serving_helpers import free_port, running, servers, tiny_engine

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.serving.comparing import Question, compare
from kveraser.serving.decoding import Sampling
from kveraser.serving.engine import Engine, EngineOptions
from kveraser.serving.explicit import Sessions, What
from kveraser.serving.jobs import Job

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
        ("POST", f"{at}/repair", None),
        ("POST", f"{at}/generate", {"prompt": "x"}),
    ):
        reply = server.call(method, path, "beta", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
    assert server.call("GET", at, "alpha").status_code == 200


@pytest.mark.parametrize("how", ["at once", "steered and saved before"])
def test_after_a_purge_the_secret_is_in_no_file_and_no_reply(serve, tmp_path, how):
    server = serve(state_dir=tmp_path / "state")
    name = create(server, None, "the car is blue", SECRET, "the door is fast")
    at = f"/v1/sessions/{name}"
    everything = lambda: b"".join(f.read_bytes() for f in sorted(tmp_path.rglob("*")) if f.is_file())  # noqa: E731
    assert SECRET.encode() in everything()
    ids = make_tokenizer().encode(SECRET)
    if how == "at once":
        reply = server.call("DELETE", f"{at}/messages/call-1?purge=true&method=kveraser")
    else:
        erased = server.call("DELETE", f"{at}/messages/call-1").json()
        server.call("POST", f"{at}/restore", json={"erase": erased["id"]})
        reply = server.call("POST", f"{at}/erase", json={"text": SECRET, "purge": True, "method": "delete-and-shift"})
    assert reply.status_code == 200
    assert reply.json()["exact"]
    shown = server.call("GET", at)
    assert SECRET not in shown.text
    assert shown.json()["exact"]
    server.engine.close()
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
    assert server.engine.store.count[1] > 0
    for number, name in enumerate(names):
        assert f"the code is {number}" in server.call("GET", f"/v1/sessions/{name}").text
        assert server.engine.store.bytes <= 100_000


_SERVER = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.serving.engine import Engine, EngineOptions
from kveraser.serving.explicit import Sessions, What
engine = Engine(text_model(), make_tokenizer(), random_eraser(text_model()), EngineOptions(state_dir=Path({state!r})))
sessions = Sessions(engine)
name = sessions.create("me").id
print("session", name, flush=True)
for number in range(10_000):
    sessions.append_message("me", name, "tool", f"the code is {{number}}", f"call-{{number}}")
    if number % 5 == 4:
        sessions.erase("me", name, What(message=f"call-{{number - 2}}"), "kveraser")
    print("done", number, flush=True)
"""


def test_what_was_acknowledged_is_there_after_kill_minus_nine(tmp_path):
    here = Path(__file__).parent
    code = _SERVER.format(tests=str(here.parent), here=str(here), state=str(tmp_path / "state"))
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        name, last = "", -1
        for line in process.stdout:  # also what was written before the kill and read after it
            word, _, value = line.strip().partition(" ")
            name = value if word == "session" else name
            last = int(value) if word == "done" else last
            if last == 17:
                os.kill(process.pid, signal.SIGKILL)
    model = text_model()
    engine = Engine(model, make_tokenizer(), random_eraser(model), EngineOptions(state_dir=tmp_path / "state"))
    try:
        context = Sessions(engine).get("me", name).context
        assert len(context.messages) in (last + 1, last + 2)  # one more may be on disk and not acknowledged
        twin = kv.ErasableContext(model, make_tokenizer(), random_eraser(model))
        for number in range(len(context.messages)):
            twin.append_message("tool", f"the code is {number}", id=f"call-{number}")
            if number % 5 == 4 and (number <= last or context.erased[-1].end > twin.messages[number - 2][1].start):
                twin.erase(f"call-{number - 2}")
        assert context.erased == twin.erased
        assert context.generate("the code?", max_new_tokens=8) == twin.generate("the code?", max_new_tokens=8)
    finally:
        engine.close()


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
    engine, most = tiny_engine(cache_budget=budget), []
    with running(engine) as url, ThreadPoolExecutor(16) as pool:
        together = [pool.submit(told_over_http, url, number) for number in range(16)]
        while not all(each.done() for each in together):
            most.append(engine.submit(lambda job: engine.store.bytes).future.result(60))
            time.sleep(0.02)
        assert [each.result() for each in together] == [told_alone(number) for number in range(16)]
        assert 'status="5' not in httpx.get(f"{url}/metrics").text
        assert engine.store.count[1] > 0
    assert max(most) <= budget


def operations(number):
    """What a client does with its session, without end: (what, message)."""
    for turn in itertools.count():
        yield "message", turn
        yield "question", turn
        if turn % 2:
            yield "erase", turn // 2


def do_over_http(client, at, number, what, turn):
    if what == "message":
        body = {"role": "tool", "content": f"the code of {number} is {turn}", "id": f"call-{turn}"}
        reply = client.post(f"{at}/messages", json=body)
    elif what == "question":
        reply = client.post(f"{at}/generate", json={"prompt": f"and {turn}?", "max_tokens": 3, "keep": True})
    else:
        reply = client.delete(f"{at}/messages/call-{turn}")
    reply.raise_for_status()


def do_directly(context, number, what, turn):
    if what == "message":
        context.append_message("tool", f"the code of {number} is {turn}", id=f"call-{turn}")
    elif what == "question":
        context.generate(f"and {turn}?", max_new_tokens=3, keep=True)
    else:
        context.erase(f"call-{turn}")


@contextmanager
def server_process(folder):
    """`kveraser serve` in a process of its own; gives it, and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "kveraser", "serve", "--model", folder / "model", "--eraser", folder / "eraser",
               "--dtype", "float32", "--port", port, "--state-dir", folder / "state"]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(1200):
                assert process.poll() is None, process.stderr.read()
                with suppress(httpx.TransportError):
                    httpx.get(f"{url}/healthz")
                    break
                time.sleep(0.1)
            yield process, url
        finally:
            process.kill()


def test_after_kill_minus_nine_under_load_every_acknowledged_turn_is_there_and_goes_on_identically(tmp_path):
    model = text_model()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    random_eraser(model).save_pretrained(tmp_path / "eraser")
    sessions = {}  # of each client: where, and how many operations were acknowledged

    with server_process(tmp_path) as (process, url):

        def work(number):
            with httpx.Client(base_url=url, timeout=120) as client, suppress(httpx.TransportError):
                at = f"/v1/sessions/{client.post('/v1/sessions').json()['id']}"
                for count, (what, turn) in enumerate(operations(number), start=1):
                    do_over_http(client, at, number, what, turn)
                    sessions[number] = at, count

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(work, number) for number in range(4)]
            while len(sessions) < 4 or min(count for _, count in sessions.values()) < 8:
                assert not any(client.done() for client in clients)
                time.sleep(0.001)
            process.kill()
            for client in clients:
                client.result()

    with server_process(tmp_path) as (_, url), httpx.Client(base_url=url, timeout=120) as client:
        for number, (at, count) in sessions.items():
            twin = kv.ErasableContext(model, make_tokenizer(), random_eraser(model))
            todo = operations(number)
            for what, turn in itertools.islice(todo, count):
                do_directly(twin, number, what, turn)

            def ledger(context):
                runs = [(span, "live") for span in context.live_spans] + [(span, "erased") for span in context.erased]
                return [([span.start, span.end], state, context.text_of(span)) for span, state in sorted(runs)]

            shown = client.get(at).json()
            found = [(run["span"], run["state"], run["text"]) for run in shown["runs"]]
            if found != ledger(twin):  # one more may be on disk and not acknowledged
                do_directly(twin, number, *next(todo))
            assert found == ledger(twin)
            assert shown["exact"] == twin.exact
            for prompt in ("the code?", "and it?"):
                reply = client.post(f"{at}/generate", json={"prompt": prompt, "max_tokens": 6, "keep": True}).json()
                assert reply["text"] == twin.generate(prompt, max_new_tokens=6, keep=True)


class Machine(RuleBasedStateMachine):
    """Random operations on one session, with restarts, against a plain list of what should be in it."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.start()
        self.name = self.sessions.create("me").id
        self.pieces = []  # [text, span, id of its erase or None, purged]

    def start(self):
        model = text_model()
        options = EngineOptions(state_dir=Path(self.folder.name) / "state", cache_budget=1 << 22)
        self.engine = Engine(model, make_tokenizer(), random_eraser(model), options)
        self.sessions = Sessions(self.engine)

    @property
    def context(self):
        return self.sessions.get("me", self.name).context

    @rule(text=st.sampled_from(["the code is 1234. ", "the car is blue. ", "it is fast. ", "çödé 🎈 "]))
    def append(self, text):
        span = self.sessions.append_text("me", self.name, text)
        self.pieces.append([text, span, None, False])

    @precondition(lambda self: any(piece[2] is None for piece in self.pieces))
    @rule(
        data=st.data(), method=st.sampled_from(["kveraser", "full-recompute", "delete-and-shift"]), purge=st.booleans()
    )
    def erase(self, data, method, purge):
        piece = data.draw(st.sampled_from([piece for piece in self.pieces if piece[2] is None]))
        receipt = self.sessions.erase("me", self.name, What(spans=(piece[1],)), method, purge=purge)
        piece[2:] = [receipt.id, purge]
        if purge:
            assert self.context.exact

    @precondition(lambda self: any(piece[2] and not piece[3] for piece in self.pieces))
    @rule(data=st.data())
    def restore(self, data):
        piece = data.draw(st.sampled_from([piece for piece in self.pieces if piece[2] and not piece[3]]))
        self.sessions.restore("me", self.name, piece[2])
        piece[2] = None

    @rule()
    def repair(self):
        self.sessions.repair("me", self.name, Job(lambda job: None, 60))
        assert self.context.exact

    @rule()
    def restart(self):
        self.engine.close()
        self.start()

    @precondition(lambda self: any(piece[2] is None for piece in self.pieces))
    @rule()
    def ask(self):
        before = self.context.live_ids
        self.sessions.generate("me", self.name, "and?", Sampling(3), False, Job(lambda job: None, 60))
        assert self.context.live_ids == before

    @invariant()
    def the_text_is_what_it_should_be(self):
        assert self.context.text == "".join(piece[0] for piece in self.pieces if piece[2] is None)

    @invariant()
    def what_is_called_exact_equals_a_fresh_prefill(self):
        context = self.context
        if context.exact and context.live_ids:
            plain = kv.ErasableContext(context.model)
            plain.append_ids(context.live_ids)
            assert float((plain.logits([5]) - context.logits([5])).abs().max()) < 1e-3

    def teardown(self):
        self.engine.close()
        self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestMachine = Machine.TestCase
