"""The application as a whole."""

from __future__ import annotations

import pytest
from serving_helpers import servers


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def test_the_routes_are_shown_in_one_place(serve):
    server = serve()
    assert server.call("GET", "/docs").status_code == 200
    assert server.call("GET", "/redoc").status_code == 404


def test_the_openapi_document_names_every_route(serve):
    paths = serve().call("GET", "/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/healthz", "/metrics", "/v1/sessions",
            "/v1/sessions/{session_id}/compare", "/v1/examples", "/v1/methods"} <= set(paths)  # fmt: skip
