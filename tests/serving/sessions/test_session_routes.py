"""What only the endpoints of sessions do: streams of progress."""

from __future__ import annotations

import pytest
from serving_helpers import PARTS, event_list, servers, session


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def test_the_progress_of_a_repair_is_streamed(serve):
    server = serve()
    at = session(server, *PARTS, "and the door is fast " * 60)
    server.call("POST", f"{at}/erase", json={"text": PARTS[1]})
    *steps, last = event_list(server.call("POST", f"{at}/repair?stream=true").text)
    done = [step["done"] for step in steps]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == steps[-1]["total"] == last["tokens_recomputed"]
    assert last["exact"]
    assert server.call("GET", at).json()["exact"]
    assert event_list(server.call("POST", f"{at}/repair?stream=true").text) == [{"exact": True, "tokens_recomputed": 0}]
    assert server.call("POST", "/v1/sessions/none/repair?stream=true").status_code == 404
