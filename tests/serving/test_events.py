"""Server-sent events: one line each, whatever is in them."""

from __future__ import annotations

import json

from kveraser.serving.events import event_line


def test_an_event_is_one_line_for_every_client_whatever_its_text():
    text = "".join(map(chr, range(0x2100))) + "\u2028\u2029\x85\N{BALLOON}"
    line = event_line({"text": text})
    assert line.endswith("\n\n")
    assert len(line[:-2].splitlines()) == 1
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


def test_text_that_breaks_no_line_is_sent_as_it_is():
    assert event_line({"text": "çödé 🎈 漢字"}) == 'data: {"text": "çödé 🎈 漢字"}\n\n'
