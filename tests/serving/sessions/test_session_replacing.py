"""Replacing in a session, over HTTP: what it says then, what can be undone, and what a comparison compares."""

from __future__ import annotations

import pytest
from serving_helpers import PARTS, servers, session

WHOLE = "".join(PARTS)


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def runs(server, at):
    return [(run["text"], run["state"], run["new"]) for run in server.call("GET", at).json()["runs"]]


def live(server, at):
    return "".join(text for text, state, _ in runs(server, at) if state == "live")


@pytest.mark.parametrize("method", ["kveraser", "full-recompute"])
@pytest.mark.parametrize(
    "new", ["the code of the door is 77, ", "so it is, but the code of the car is 1234567 and fast, ", "2, "]
)
def test_a_part_says_something_else_and_the_old_text_comes_back(serve, method, new):
    server = serve()
    at = session(server, *PARTS)
    told = server.call("POST", f"{at}/replace", json={"text": PARTS[1], "new": new, "method": method})
    assert told.status_code == 200, told.text
    assert live(server, at) == PARTS[0] + new + PARTS[2]
    assert (new, "live", True) in runs(server, at)
    assert [text for text, state, _ in runs(server, at) if state == "erased"] == [PARTS[1]]
    assert told.json()["exact"] == (method == "full-recompute")
    assert len(told.json()["replacements"]) == 1
    again = server.call("POST", f"{at}/replace", json={"text": new, "new": "1, ", "method": method})
    assert again.status_code == 200, again.text
    assert live(server, at) == PARTS[0] + "1, " + PARTS[2]
    for receipt in (again, told):
        assert server.call("POST", f"{at}/restore", json={"erase": receipt.json()["id"]}).status_code == 200
    assert live(server, at) == WHOLE


def test_selected_characters_are_replaced_and_nothing_beside_them(serve):
    server = serve()
    at = session(server, WHOLE)
    start = WHOLE.index("1234")
    body = {"characters": [[start + 1, start + 3]], "new": "99"}
    assert server.call("POST", f"{at}/replace", json=body).status_code == 200
    assert live(server, at) == WHOLE.replace("1234", "1994")
    shown = server.call("GET", at).json()
    assert shown["live_tokens"] <= shown["tokens"]
    place = "".join(run["text"] for run in shown["runs"]).index("fast")
    body = {"characters": [[place, place + 4]]}
    assert server.call("POST", f"{at}/readers", json=body).status_code == 200


def test_a_message_is_replaced_by_its_id_as_often_as_wanted(serve):
    server = serve()
    at = session(server)
    server.call("POST", f"{at}/messages", json={"role": "tool", "content": "the code is 1234", "id": "a"})
    server.call("POST", f"{at}/messages", json={"role": "user", "content": "and the car?"})
    for new in ("the code is 99", "no code"):
        assert server.call("POST", f"{at}/replace", json={"message": "a", "new": new}).status_code == 200
        message = server.call("GET", at).json()["messages"][0]
        assert (message["content"].strip(), message["erased"]) == (new, False)
    assert server.call("DELETE", f"{at}/messages/a").status_code == 200
    assert server.call("GET", at).json()["messages"][0]["erased"]


def test_a_comparison_is_with_the_old_text_and_with_the_new_one_recomputed(serve):
    server = serve()
    new = "no, the code is 1234567, "
    at, fresh = session(server, *PARTS), session(server, PARTS[0], new, PARTS[2])
    server.call("POST", f"{at}/replace", json={"text": PARTS[1], "new": new})
    question = {"prompt": "the code?", "max_tokens": 6}
    said = {
        answer["version"]: answer for answer in server.call("POST", f"{at}/compare", json=question).json()["answers"]
    }
    assert {version: answer["exact"] for version, answer in said.items()} == {
        "before": True,
        "now": False,
        "recomputed": True,
    }
    (old,) = server.call("POST", f"{session(server, *PARTS)}/compare", json=question).json()["answers"]
    (wanted,) = server.call("POST", f"{fresh}/compare", json=question).json()["answers"]
    assert said["before"]["text"] == old["text"]
    assert said["recomputed"]["text"] == wanted["text"]


@pytest.mark.parametrize(
    "body", [{"text": "nowhere", "new": "x"}, {"text": "99"}, {"text": "99", "new": "1", "purge": True}, {"new": "x"}]
)
def test_what_cannot_be_replaced_is_refused_and_changes_nothing(serve, body):
    server = serve()
    at = session(server, *PARTS)
    assert server.call("POST", f"{at}/replace", json=body).status_code == 400
    assert runs(server, at) == [(WHOLE, "live", False)]
