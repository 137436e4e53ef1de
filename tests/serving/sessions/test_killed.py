"""What was acknowledged is there after kill -9."""

from __future__ import annotations

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest
from serving_helpers import free_port

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.cli import app
from kveraser.serving.service import Service, ServiceOptions
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.sessions.sessions import Sessions
from processes import pipe, start


def grow(state, told):
    """A session that grows for ever, in a process of its own; what is acknowledged is told."""
    options = ServiceOptions(state_dir=state)
    service = Service(text_model(), make_tokenizer(), random_eraser(text_model()), options)
    sessions = Sessions(service.store, service.limits)
    name = sessions.create("me").id
    told.send(("session", name))
    for number in range(10_000):
        sessions.append_message("me", name, "tool", f"the code is {number}", f"call-{number}")
        if number % 5 == 4:
            sessions.erase("me", name, Selection(message=f"call-{number - 2}"), "kveraser")
        told.send(("done", number))


@pytest.mark.long
def test_what_was_acknowledged_is_there_after_kill_minus_nine(tmp_path):
    heard, told = pipe()
    process = start(grow, tmp_path / "state", told, log=tmp_path / "log")
    told.close()
    name, last = "", -1
    with suppress(EOFError):
        while True:  # also what was told before the kill and is heard after it
            word, value = heard.recv()
            name = value if word == "session" else name
            last = value if word == "done" else last
            if last == 17:
                os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    model = text_model()
    service = Service(model, make_tokenizer(), random_eraser(model), ServiceOptions(state_dir=tmp_path / "state"))
    try:
        context = Sessions(service.store, service.limits).get("me", name).context
        assert len(context.messages) in (last + 1, last + 2)  # one more may be on disk and not acknowledged
        twin = kv.ErasableContext(model, make_tokenizer(), random_eraser(model))
        for number in range(len(context.messages)):
            twin.append_message("tool", f"the code is {number}", id=f"call-{number}")
            if number % 5 == 4 and (number <= last or context.erased[-1].end > twin.messages[number - 2][1].start):
                twin.erase(f"call-{number - 2}")
        assert context.erased == twin.erased
        assert context.generate("the code?", max_new_tokens=8) == twin.generate("the code?", max_new_tokens=8)
    finally:
        service.close()


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


def serve(command):
    app(command)


@contextmanager
def server_process(folder):
    """`kveraser serve` in a process of its own; gives it, and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ["serve", "--model", folder / "model", "--eraser", folder / "eraser", "--dtype", "float32", "--port", port,
               "--state-dir", folder / "state"]  # fmt: skip
    process = start(serve, list(map(str, command)), log=folder / "log")
    try:
        for _ in range(1200):
            assert process.is_alive(), (folder / "log").read_text()
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/healthz")
                break
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.join()


@pytest.mark.long
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
                time.sleep(0.01)
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
