"""The page's files and headers, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from serving_helpers import servers

import kveraser.serving.page as page
from kveraser.demo.stories import stories

WEB = Path(page.__file__).parent / "web"


@pytest.fixture
def server():
    with servers() as make:
        yield make(keys=("alpha",))


def test_the_page_is_there_without_a_key_and_allows_nothing_from_elsewhere(server):
    reply = server.call("GET", "/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_every_file_that_the_page_names_is_served_with_its_type(server):
    for file in WEB.iterdir():
        text = file.read_text()
        for name in re.findall(r'"(?:/web/|\./)([\w.]+)"', text):
            assert (WEB / name).exists(), f"{file.name} names {name}"
        reply = server.call("GET", f"/web/{file.name}")
        assert reply.status_code == 200
        assert reply.text == text
        assert reply.headers["content-type"].split(";")[0] == page._TYPES[file.suffix]


def test_the_page_has_nothing_inline_and_names_no_other_host():
    for file in WEB.iterdir():
        text = file.read_text().replace('"http://www.w3.org/2000/svg"', "")
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.MULTILINE), file.name
        assert "innerHTML" not in text
    html = (WEB / "index.html").read_text()
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", html)


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpage.py", "%2e%2e", "index.html%00"])
def test_no_other_file_is_served(server, name):
    assert server.call("GET", f"/web/{name}").status_code == 404


def test_the_examples_are_the_demos_stories_and_the_methods_say_what_can_be_used(server):
    shown = server.call("GET", "/v1/examples").json()["data"]
    assert [story["span"] for story in shown] == [story.span for story in stories()]
    assert server.call("GET", "/v1/methods").status_code == 401
    methods = {each["name"]: each for each in server.call("GET", "/v1/methods", "alpha").json()["data"]}
    assert methods["kveraser"]["available"]
    assert methods["full-recompute"]["exact"]
