"""Where a text stands among tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokenizer
from kveraser.context.text import decode, occurrences


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
    found = occurrences(tokenizer, ids, needle)
    assert len(found) == sum(text.startswith(needle, at) for at in range(len(text)))
    for span in found:
        assert needle in decode(tokenizer, ids[span.slice])
        shorter = [ids[span.start + 1 : span.end], ids[span.start : span.end - 1]]
        assert len(span) == 1 or all(needle not in decode(tokenizer, part) for part in shorter)
