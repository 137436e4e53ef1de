"""Talking to a server, and the command line it is started with: no vLLM needed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import BaseRequestHandler, TCPServer

import pytest

from kveraser.engines.vllm import demo as vllm_demo
from kveraser.engines.vllm.client.http import VLLMClient, client_id
from kveraser.engines.vllm.protocol import KEY, Demand
from kveraser.engines.vllm.server import launch
from kveraser.engines.vllm.server.launch import running_server, server_arguments, shipped_folder
from kveraser.errors import EngineError, EraserMismatchError, OptionError


@pytest.fixture
def answering():
    """A server that gives one answer, and remembers what it was asked."""
    servers = []

    def serve(status, answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.server.asked = json.loads(body), dict(self.headers)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, VLLMClient(f"http://127.0.0.1:{server.server_port}/v1", api_key="key", timeout=10)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_completion_carries_the_demand_the_salt_and_the_key(answering):
    choice = {"text": "a b", "token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5, -1.0]}}
    usage = {"prompt_tokens_details": {"cached_tokens": 3}}
    server, client = answering(200, {"choices": [choice], "usage": usage, "kv_transfer_params": {KEY: {"saved": []}}})
    done = client.complete("m", (1, 2), max_tokens=2, demand=Demand(edit="0" * 32), salt="s", top_p=0.5)
    assert (done.ids, done.text, done.logprobs, done.said, done.cached) == (
        [5, 6],
        "a b",
        [-0.5, -1.0],
        {"saved": []},
        3,
    )
    body, headers = server.asked
    assert body["prompt"] == [1, 2]
    assert (body["cache_salt"], body["top_p"], body["temperature"]) == ("s", 0.5, 0.0)
    assert body["kv_transfer_params"] == {KEY: {"edit": "0" * 32, "client": client_id("key")}}
    assert client_id("key") == client_id("key") != client_id("another")
    assert headers["Authorization"] == "Bearer key"


@pytest.mark.parametrize(
    ("status", "answer", "match"),
    [
        (400, {"error": {"message": "too long"}}, "400: too long"),
        (500, b"boom", "500: boom"),
        (200, b"no json", "cannot be reached"),
        (200, {"choices": [{"text": "", "finish_reason": "error"}]}, "could not finish"),
        (200, {"choices": [{"text": ""}], "kv_transfer_params": {KEY: {"error": "no room"}}}, "refuses: no room"),
        (200, {"choices": [{"text": ""}], "kv_transfer_params": {KEY: [7]}}, "answered otherwise"),
        (200, {"choices": [{}]}, "answered otherwise .*'text'"),
        (200, {"choices": []}, "answered otherwise"),
        (200, {"choice": []}, "answered otherwise .*'choices'"),
        (200, [7], "answered otherwise"),
    ],
)
def test_whatever_a_server_does_wrong_is_an_error_of_ours(answering, status, answer, match):
    _, client = answering(status, answer)
    with pytest.raises(EngineError, match=match):
        client.complete("m", [1], max_tokens=1)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"cho', "cannot be reached.*5 bytes read"),
        (b"HTTP/1.1 500 \r\nContent-Length: 100\r\n\r\n{", "answered 500"),
        (b"220 a mail server\r\n", "cannot be reached.*220 a mail"),
        (b"HTTP/1.1 200 OK\r\n" + 200 * b"a: b\r\n", "cannot be reached.* headers"),
        (b"", "cannot be reached"),
    ],
)
def test_an_answer_that_breaks_off_or_is_no_http_is_an_error_of_ours(answer, match):
    class Handler(BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(answer)

    with TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(EngineError, match=match):
            VLLMClient(f"http://127.0.0.1:{server.server_address[1]}", timeout=10).models()


@pytest.mark.parametrize("answer", [{}, {"data": 7}, {"data": [7]}, {"data": [{"name": "m"}]}, [], None])
def test_models_and_tokens_that_are_told_otherwise_are_an_error_of_ours(monkeypatch, answer):
    monkeypatch.setattr(VLLMClient, "call", lambda *_: answer)
    with pytest.raises(EngineError, match="/v1/models answered otherwise"):
        VLLMClient("http://a").models()
    with pytest.raises(EngineError, match="/tokenize answered otherwise"):
        VLLMClient("http://a").tokenize("m", "a")


def test_a_server_that_is_not_there_is_an_error_of_ours():
    with pytest.raises(EngineError, match="cannot be reached"):
        VLLMClient("http://127.0.0.1:9", timeout=2).models()
    with pytest.raises(EngineError, match="http"):
        VLLMClient("localhost:8000")


def test_the_servers_arguments_fail_closed_and_name_the_eraser_that_ships():
    eraser = shipped_folder("smollm2-135m-instruct")
    said = server_arguments("some/model", eraser, "/edits", capacity_gb=3, extra=["--tensor-parallel-size", "2"])
    transfer = json.loads(said[said.index("--kv-transfer-config") + 1])
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_connector_extra_config"] == {"store": "/edits", "capacity_gb": 3, "eraser": str(eraser)}
    assert said[said.index("--lora-modules") + 1] == f"eraser={eraser}"
    assert said[said.index("--max-lora-rank") + 1] == "16"
    assert said[said.index("--max-loras") + 1] == "2"
    assert said[-2:] == ["--tensor-parallel-size", "2"]


def test_a_folder_without_an_eraser_is_named(tmp_path):
    with pytest.raises(OptionError, match="adapter_config.json"):
        server_arguments("some/model", tmp_path, "/edits")
    with pytest.raises(OptionError, match="no eraser ships for 'some/model'"):
        shipped_folder("some/model")


def test_an_eraser_that_engines_cannot_run_is_refused_before_a_server_is_started():
    with pytest.raises(EraserMismatchError, match="values=learned, which works in transformers only"):
        server_arguments("some/model", shipped_folder("qwen2.5-coder-0.5b-instruct"), "/edits")


def test_a_server_that_ends_at_once_is_an_error_that_names_its_log(tmp_path):
    log = tmp_path / "server.log"
    with pytest.raises(EngineError, match="server.log"), running_server(["--no-such-option"], log=log):
        pass
    assert log.exists()


def test_the_demo_says_when_there_is_no_server(capsys):
    assert vllm_demo.main(["--url", "http://127.0.0.1:9"]) == 2
    assert "EngineError" in capsys.readouterr().out


def test_only_the_connector_and_the_layout_need_vllm():
    modules = ("client", "server.launch", "demo", "server.store", "server.states", "server.entries", "proxy.app")
    code = "import sys; sys.modules['vllm'] = None; import kveraser; "
    code += "; ".join(f"import kveraser.engines.vllm.{name}" for name in modules)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("given", [[], ["--api-key", ""], ["--api-key="], ["--api-key", "--port", "80"]])
def test_the_server_listens_on_this_machine_alone_unless_it_has_a_key(given, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    started, named = [], ["--model", "some/model", "--eraser", str(shipped_folder("smollm2-135m-instruct"))]
    monkeypatch.setattr(launch.os, "execv", lambda program, command: started.append(command))
    launch.main([*named, *given])
    assert started[0][started[0].index("--host") + 1] == "127.0.0.1"
    with pytest.raises(OptionError, match="--api-key"):
        launch.main([*named, "--host", "0.0.0.0", *given])
    launch.main([*named, "--host", "0.0.0.0", "--api-key", "secret"])
    assert started[1][started[1].index("--host") + 1] == "0.0.0.0"
