"""Erasing what is selected of what is shown."""

from __future__ import annotations

import pytest
from serving_helpers import servers, session


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def test_characters_of_what_is_shown_can_be_erased(serve):
    server = serve()
    at = session(server, "the çödé 🎈 is 1234, ", "the car is blue")
    text = "the çödé 🎈 is 1234, the car is blue"

    def erase(start, end, status=200):
        reply = server.call("POST", f"{at}/erase", json={"characters": [[start, end]]})
        assert reply.status_code == status, reply.text
        return reply.json()

    def shown():
        return server.call("GET", at).json()["runs"]

    assert "".join(run["text"] for run in shown()) == text
    where = text.index("1234")
    erase(where, where + 4)
    gone = [run["text"] for run in shown() if run["state"] == "erased"]
    assert len(gone) == 1
    assert "1234" in gone[0]
    assert "".join(run["text"] for run in shown()) == text
    assert "erased already" in erase(where, where + 1, 400)["error"]["message"]
    erase(text.index("is 1"), len(text) - 4)  # over what is erased: the rest of it
    assert "".join(run["text"] for run in shown() if run["state"] == "live").startswith("the çödé 🎈")
    for start, end in ((3, 3), (5, 2), (0, len(text) + 1)):
        assert "no part" in erase(start, end, 400)["error"]["message"]
    assert server.call("POST", f"{at}/erase", json={"characters": [[0, 1]], "text": "the"}).status_code == 400


def test_a_text_that_is_everywhere_is_refused_as_soon_as_a_second_one_is_found(serve, monkeypatch):
    server = serve()
    at = session(server, "a " * 3000, "the code is 1234")
    decoded, decode = [], server.service.tokenizer.decode
    monkeypatch.setattr(
        server.service.tokenizer, "decode", lambda *args, **options: decoded.append(1) or decode(*args, **options)
    )
    reply = server.call("POST", f"{at}/erase", json={"text": "a"})
    assert reply.status_code == 400
    assert "more than once" in reply.json()["error"]["message"]
    assert len(decoded) <= 2
    assert server.call("POST", f"{at}/erase", json={"text": "aa"}).status_code == 400  # not there
    assert server.call("POST", f"{at}/erase", json={"text": ""}).status_code == 400
    assert server.call("POST", f"{at}/erase", json={"text": "1234"}).status_code == 200
    assert "1234" not in "".join(run["text"] for run in server.call("GET", at).json()["runs"] if run["state"] == "live")


def test_places_that_overlap_are_two(serve):
    server = serve()
    at = session(server, "blueblueblue")
    assert "more than once" in server.call("POST", f"{at}/erase", json={"text": "blueblue"}).text
