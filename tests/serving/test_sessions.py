"""Explicit sessions over HTTP: what they do, whom they belong to, purging, kill -9, and random sequences of operations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from serving_helpers import servers

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
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
    import kveraser.paths

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(kveraser.paths.os, "fsync", full)
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
