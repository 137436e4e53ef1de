"""JSON in an envelope with format and checksum."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kveraser.errors import DamagedError
from kveraser.files import digest, digest_json, enclosed, opened

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


@given(BODIES, st.sampled_from(("body", "session")), st.sampled_from((None, 2)))
@settings(max_examples=30, deadline=None)
def test_what_was_enclosed_is_opened(body, name, indent):
    assert opened(json.loads(enclosed(body, 3, name=name, indent=indent)), 3, "it", name=name) == body


@given(BODIES, st.text(max_size=5), VALUES)
@settings(max_examples=30, deadline=None)
def test_a_body_that_was_changed_is_not_opened(body, key, value):
    envelope = json.loads(enclosed(body, 1))
    envelope["body"][key] = value
    if digest_json(envelope["body"]) == digest_json(body):  # nothing was changed
        assert opened(envelope, 1, "it") == body
    else:
        with pytest.raises(DamagedError, match="it was altered"):
            opened(envelope, 1, "it")


def test_a_newer_format_is_refused_by_its_number():
    with pytest.raises(DamagedError, match="it has format 4, this version reads 3; update kveraser"):
        opened(json.loads(enclosed({}, 4)), 3, "it")


@pytest.mark.parametrize("said", [{}, [], {"format": 1, "body": {}}, {"format": "1", "sha256": "", "body": {}},
                                  {"format": 1, "sha256": digest_json([]), "body": []}])  # fmt: skip
def test_what_is_no_envelope_is_told_from_one_that_was_altered(said):
    with pytest.raises((KeyError, TypeError)):
        opened(said, 1, "it")


def test_the_checksum_of_json_does_not_depend_on_the_order_of_its_keys(tmp_path):
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1}) != digest_json({"a": 2, "b": 1})
    (tmp_path / "file").write_bytes(json.dumps({"a": 1}).encode())
    assert digest(tmp_path / "file") == digest_json({"a": 1})
