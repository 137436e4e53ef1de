"""Who has read something, over HTTP: before an erase as numbers for each token, after it in every reply."""

from __future__ import annotations

import pytest
from serving_helpers import PARTS, servers, session

LONG = "the car is blue and fast. it has a door with a code, and the code of the door is blue. " * 6


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def test_the_readers_of_a_selection_are_tokens_behind_it_the_most_attentive_first(serve):
    server = serve()
    at = session(server, *PARTS, LONG)
    text = "".join(run["text"] for run in server.call("GET", at).json()["runs"])
    start = text.index(PARTS[1])
    before = server.call("GET", at).json()
    found = server.call("POST", f"{at}/readers", json={"characters": [[start, start + len(PARTS[1])]]}).json()
    assert server.call("GET", at).json() == before  # nothing is changed
    ((first, end),) = found["spans"]
    shares = [reader["read"] for reader in found["readers"]]
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share <= 1 for share in shares)
    for reader in found["readers"]:
        assert reader["span"][0] >= end > first
        a, b = reader["characters"]
        assert text[a:b] == reader["text"]
    assert 0 < found["shown"] <= 1
    same = server.call("POST", f"{at}/readers", json={"spans": found["spans"]}).json()
    assert same == found


def test_who_has_read_what_is_not_there_is_refused(serve):
    server = serve()
    at = session(server, *PARTS)
    for body in (
        {"text": "nowhere"},
        {"characters": [[5, 5]]},
        {"spans": [[0, 10_000]]},
        {},
        {"text": "a", "message": "b"},
    ):
        assert server.call("POST", f"{at}/readers", json=body).status_code in (400, 422)
    assert server.call("POST", f"{at}/erase", json={"text": PARTS[1]}).status_code == 200
    assert server.call("POST", f"{at}/readers", json={"text": PARTS[1]}).status_code == 400


def test_an_erase_says_what_was_recomputed_how_much_is_left_and_by_which_eraser(serve):
    server = serve()
    at = session(server, *PARTS, LONG)
    done = server.call(
        "POST", f"{at}/erase", json={"text": PARTS[1], "method": "kveraser:repair=8,choose=readers"}
    ).json()
    assert done["eraser"] in ("neutral", "trained")
    assert sum(end - start for start, end in done["recomputed"]) == 8
    assert all(start >= done["spans"][0][1] for start, _ in done["recomputed"])
    assert 0 < done["residual"] < 1
    shown = server.call("GET", at).json()
    assert shown["erases"][0]["recomputed"] == done["recomputed"]
    text = "".join(run["text"] for run in shown["runs"])
    marked = [text[start:end] for start, end in shown["recomputed"]]
    assert marked[0].startswith(PARTS[2][:2])  # the first behind the span are always among them
    assert server.call("POST", f"{at}/repair").status_code == 200
    assert server.call("GET", at).json()["recomputed"] == []
