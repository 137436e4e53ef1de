"""A server that is told to stop answers everybody who waits."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from serving_helpers import free_port, tiny_service

from kveraser.serving.app import AppOptions, create_app
from kveraser.serving.server import Server


@pytest.fixture
def server():
    """One on a tiny model that gives half a second to what runs when it is told to stop."""
    service = tiny_service(grace=0.5)
    found = Server(create_app(service, AppOptions("tiny")), service.stop_soon, 0.5, port=free_port(), log_level="error")
    thread = threading.Thread(target=found.run)
    thread.start()
    while not found.started:
        time.sleep(0.01)
    yield found, service
    found.should_exit = True
    thread.join()


def endless(job):
    while True:
        job.check()
        time.sleep(0.001)


def test_who_waits_when_the_server_stops_is_told_so_and_not_that_it_made_a_mistake(server):
    server, service = server
    busy = service.submit(endless)
    while busy.waits:
        time.sleep(0.01)
    replies = []

    def ask(path, body):
        replies.append(httpx.post(f"http://127.0.0.1:{server.config.port}{path}", json=body, timeout=30))

    talk = {"model": "tiny", "messages": [{"role": "user", "content": "the car"}], "max_tokens": 4}
    asked = [("/v1/chat/completions", talk), ("/v1/chat/completions", {**talk, "stream": True}), ("/v1/messages", talk)]
    clients = [threading.Thread(target=ask, args=each) for each in asked]
    for client in clients:
        client.start()
    while service.worker.waiting < len(asked):
        time.sleep(0.01)
    server.should_exit = True
    for client in clients:
        client.join()
    assert sorted(reply.status_code for reply in replies) == [503, 503, 529]
    assert all("stopping" in reply.text for reply in replies)
    assert "stopping" in str(busy.future.exception(5))


def test_what_is_done_within_the_grace_is_answered_as_ever(server):
    server, service = server
    go_on = threading.Event()
    busy = service.submit(lambda job: go_on.wait(5))
    while busy.waits:
        time.sleep(0.01)
    replies = []
    body = {"model": "tiny", "prompt": "the car", "max_tokens": 4}
    client = threading.Thread(
        target=lambda: replies.append(
            httpx.post(f"http://127.0.0.1:{server.config.port}/v1/completions", json=body, timeout=30)
        )
    )
    client.start()
    while not service.worker.waiting:
        time.sleep(0.01)
    server.should_exit = True
    go_on.set()
    client.join()
    assert replies[0].status_code == 200
