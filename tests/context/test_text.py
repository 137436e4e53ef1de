"""Where a text stands among tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import make_tokenizer
from kveraser.context.text import TokenBorders, decode, find_text


@given(st.text(min_size=1, max_size=40), st.data())
def test_a_text_is_found_where_it_stands(text, data):
    tokenizer = make_tokenizer()
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids or decode(tokenizer, ids) != text:
        return
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    needle = text[start:end]
    borders = TokenBorders(tokenizer, ids)
    places = [at for at in range(len(text)) if text.startswith(needle, at)]
    found = [borders.span(at, at + len(needle)) for at in places]
    if len(found) == 1:
        assert find_text(tokenizer, [(kv.Span(7, 7 + len(ids)), ids)], needle) == found[0].shift(7)
    else:
        with pytest.raises(kv.SpanError, match="more than once"):
            find_text(tokenizer, [(kv.Span(7, 7 + len(ids)), ids)], needle)
    for span in found:
        assert needle in decode(tokenizer, ids[span.slice])
        shorter = [ids[span.start + 1 : span.end], ids[span.start : span.end - 1]]
        assert len(span) == 1 or all(needle not in decode(tokenizer, part) for part in shorter)


def test_a_frequent_text_is_refused_after_the_second_place(monkeypatch):
    tokenizer, worked_out = make_tokenizer(), []
    real = TokenBorders.span
    monkeypatch.setattr(TokenBorders, "span", lambda *args: worked_out.append(args) or real(*args))
    ids = tokenizer.encode("a" * 5000, add_special_tokens=False)
    runs = iter([(kv.Span(0, len(ids)), ids), (kv.Span(len(ids), 2 * len(ids)), ids)])
    with pytest.raises(kv.SpanError, match="more than once"):
        find_text(tokenizer, runs, "a")
    assert worked_out == []
    assert len(list(runs)) == 1  # not even looked at


def test_a_text_that_is_once_in_each_of_two_runs_is_refused():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("the code", add_special_tokens=False)
    runs = [(kv.Span(0, len(ids)), ids), (kv.Span(20, 20 + len(ids)), ids)]
    with pytest.raises(kv.SpanError, match="more than once"):
        find_text(tokenizer, runs, "code")
    assert find_text(tokenizer, runs[:1], "code").end == len(ids)
