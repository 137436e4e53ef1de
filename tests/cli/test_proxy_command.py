"""`kveraser proxy`: what cannot be is refused at once; it passes its options on."""

from __future__ import annotations

import pytest
import uvicorn
from typer.testing import CliRunner

import kveraser.engines.vllm.proxy.front as front
from kveraser.cli import app

run = CliRunner()
UP = ["--upstream", "http://127.0.0.1:8001"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*UP, "--host", "0.0.0.0"], "KVERASER_API_KEYS"),
        ([*UP, "--policy", "magic"], "policy"),
        ([*UP, "--tokens", "x"], "size"),
        ([*UP, "--api-key", ""], "is empty"),
        ([*UP, *UP], "2 times"),
        (["--upstream", "localhost:8001"], "http://"),
        ([*UP, "--tokenizer", "/nowhere"], "no tokenizer"),
        ([], "upstream"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_at_once(options, words, monkeypatch):
    monkeypatch.delenv("KVERASER_API_KEYS", raising=False)
    result = run.invoke(app, ["proxy", *options])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_it_listens_with_keys_from_the_environment_and_has_one_of_its_own_for_the_servers(monkeypatch):
    seen, made = {}, []
    make = front.Front.__init__
    monkeypatch.setattr(front.Front, "__init__", lambda self, *args: made.append(args) or make(self, *args))
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self: seen.update(vars(self.config), started=setattr(self, "started", True))
    )
    monkeypatch.setenv("KVERASER_API_KEYS", "alpha,beta")
    monkeypatch.setenv("KVERASER_UPSTREAM_KEY", "gamma")
    result = run.invoke(app, ["proxy", *UP, "--host", "0.0.0.0", "--policy", "auto", "--min-saved", "7"])
    assert result.exit_code == 0, result.output
    assert not any(key in result.output for key in ("alpha", "beta", "gamma"))
    assert seen["access_log"] is False
    assert len(seen["app"].state.keys._digests) == 2
    ((urls, options, tokenizer),) = made
    assert (urls, tokenizer) == (["http://127.0.0.1:8001"], None)
    assert (options.policy, options.upstream_key, options.min_saved, options.tokens) == ("auto", "gamma", 7, 8 << 20)
