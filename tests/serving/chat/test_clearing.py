"""Contents left out of a conversation's tokens."""

from __future__ import annotations

import copy

from hypothesis import given
from hypothesis import strategies as st
from serving_helpers import tool_tokenizer

from kveraser.serving.chat.clearing import Cleared, cleared_ids
from kveraser.serving.chat.messages import Call, ChatMessage
from kveraser.serving.chat.template import ChatTemplate

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
TALKS = st.lists(st.tuples(st.text(max_size=20), st.dictionaries(st.text(max_size=4), VALUES, max_size=2)), min_size=1, max_size=4)  # fmt: skip


def talk_of(parts):
    talk = [ChatMessage("user", "what?")]
    for number, (content, arguments) in enumerate(parts):
        talk += [ChatMessage("assistant", calls=(Call(f"c{number}", "look", arguments),)),
                 ChatMessage("tool", content, call_id=f"c{number}")]  # fmt: skip
    return talk


def is_within(short, long):
    rest = iter(long)
    return all(each in rest for each in short)


@given(TALKS, st.sets(st.integers(0, 3)), st.booleans())
def test_what_is_left_is_a_part_of_the_conversations_own_tokens(parts, chosen, inputs):
    tokenizer, talk = tool_tokenizer(), talk_of(parts)
    template = ChatTemplate(tokenizer)
    chosen = {number for number in chosen if number < len(parts)}
    cleared = Cleared(
        frozenset(2 * number + 2 for number in chosen),
        frozenset((2 * number + 1, 0) for number in chosen if inputs),
    )
    whole = tokenizer.encode(template.render(talk), add_special_tokens=False)
    left = cleared_ids(tokenizer, talk, cleared, template.render)
    assert is_within(left, whole)
    if not chosen:
        assert list(left) == whole
    ways = len(tokenizer.encode("kveraser", add_special_tokens=False))
    removed = sum(len(tokenizer.encode(parts[number][0], add_special_tokens=False)) for number in chosen)
    assert len(whole) - len(left) >= removed - ways * len(chosen)


def test_the_tokens_of_a_content_and_nothing_else_are_left_out():
    tokenizer = tool_tokenizer()
    talk = talk_of([("the code of the door is 1234", {"what": "door"})])
    left = cleared_ids(tokenizer, talk, Cleared(frozenset({2})), ChatTemplate(tokenizer).render)
    text = tokenizer.decode(left, clean_up_tokenization_spaces=False)
    assert "<tool_response>\n\n</tool_response>" in text
    assert '{"what": "door"}' in text
    both = cleared_ids(tokenizer, talk, Cleared(frozenset({2}), frozenset({(1, 0)})), ChatTemplate(tokenizer).render)
    assert '"arguments": {}' in tokenizer.decode(both, clean_up_tokenization_spaces=False).replace('{"}', "{}")


def test_a_template_that_changes_contents_shows_empty_ones_instead():
    tokenizer = copy.deepcopy(tool_tokenizer())
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "+ m.content + '\\n</tool", "+ (m.content | upper) + '\\n</tool"
    )
    talk = talk_of([("the code of the door is 1234", {})])
    left = cleared_ids(tokenizer, talk, Cleared(frozenset({2})), ChatTemplate(tokenizer).render)
    assert "<tool_response>\n\n</tool_response>" in tokenizer.decode(left, clean_up_tokenization_spaces=False)
