"""`kveraser serve`: options that cannot be are refused before anything is loaded."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import kveraser as kv
from conftest import make_tokenizer, text_model
from kveraser.cli import app
from kveraser.cli.listening import parse_bytes, parse_readers
from kveraser.serving.exposure import is_loopback
from kveraser.serving.service import ServiceOptions

run = CliRunner()


def test_sizes_are_read_and_other_words_refused():
    assert [parse_bytes(text) for text in ("512M", "4g", "1.5 GiB", "100", "8MB")] == [
        512 << 20, 4 << 30, 3 << 29, 100, 8 << 20,
    ]  # fmt: skip
    for text in ("", "many", "-1G", "0", "4T"):
        with pytest.raises(kv.OptionError, match="size"):
            parse_bytes(text)


def test_readers_are_a_number_or_go_by_the_length():
    assert [parse_readers(text) for text in ("70", " 0 ", "length", "Length")] == [70, 0, None, None]
    for text in ("", "many", "-1", "1.5", "none"):
        with pytest.raises(kv.OptionError, match="write 70, or length"):
            parse_readers(text)
    with pytest.raises(kv.OptionError, match="readers=-1"):
        ServiceOptions(readers=-1)


def test_only_loopback_is_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "KVERASER_API_KEYS"),
        (["--policy", "magic"], "policy"),
        (["--cache-budget", "x"], "size"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(options, words, monkeypatch):
    monkeypatch.delenv("KVERASER_API_KEYS", raising=False)
    result = run.invoke(app, ["serve", *options])
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("keys", ["", "  ", "schlüssel", "two words", "line\nbreak"])
def test_a_key_that_lets_everybody_in_or_that_nobody_can_send_is_refused_and_not_shown(host, keys, monkeypatch):
    monkeypatch.delenv("KVERASER_API_KEYS", raising=False)
    result = run.invoke(app, ["serve", "--host", host, "--api-key", "a-good-one", "--api-key", keys])
    assert result.exit_code == 2
    assert "API key 2 of 2" in " ".join(result.output.split())
    assert not keys.strip() or keys not in result.output


@pytest.mark.parametrize("keys", ["alpha,", ",", "alpha,,beta"])
def test_an_empty_key_among_those_of_the_environment_is_refused(keys, monkeypatch):
    monkeypatch.setenv("KVERASER_API_KEYS", keys)
    result = run.invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "is empty" in result.output


def test_it_serves_with_keys_from_the_environment_and_without_an_access_log(monkeypatch):
    import uvicorn

    import kveraser.cli.serve as command

    seen = {}
    monkeypatch.setenv("KVERASER_API_KEYS", "alpha, beta")
    monkeypatch.setattr(command, "load", lambda *_: (text_model(), make_tokenizer()))
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self: seen.update(vars(self.config), started=setattr(self, "started", True))
    )
    result = run.invoke(app, ["serve", "--host", "0.0.0.0", "--served-name", "tiny", "--policy", "auto"])
    assert result.exit_code == 0, result.output
    assert "tiny" in result.output
    assert "alpha" not in result.output
    assert seen["access_log"] is False
    assert len(seen["app"].state.keys._digests) == 2


def test_help_has_an_example():
    assert "kveraser serve --policy auto" in run.invoke(app, ["serve", "--help"]).output
