"""A session on a server with the connector, against a stand-in for the server: it ends where transformers' contexts end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_stand_in import StandIn

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.engines.vllm.client import session as vllm_session
from kveraser.engines.vllm.client.session import VLLMSession
from kveraser.engines.vllm.protocol import KEY
from kveraser.errors import EngineError
from kveraser.methods.slots import split_tail
from kveraser.spans import Span

WORDS = "the code of the door is 1234, the color of the car is blue and it is fast; "


@pytest.fixture
def connect(tmp_path_factory, monkeypatch):
    """Make a session on a stand-in server, and a transformers context with the same eraser."""

    def connected(window=(2, 16), repair=4):
        eraser = random_eraser(text_model(), window=window, repair=repair, choose="next")
        server = StandIn(tmp_path_factory.mktemp("store"), eraser, window and list(window), repair)
        monkeypatch.setattr(vllm_session, "VLLMClient", lambda *args, **options: server)
        session = VLLMSession("http://stand-in", tokenizer=make_tokenizer())
        return server, session, kv.ErasableContext(text_model(), make_tokenizer(), eraser)

    return connected


def same_answer(session, context, question=" is it", tokens=12):
    ids = make_tokenizer().encode(question, add_special_tokens=False)
    assert session.complete(ids, max_new_tokens=tokens).ids == context.generate_ids(ids, max_new_tokens=tokens)


def states_of(server, session):
    """Keys and values `(layers, heads, tokens, dim)` of the edited context on the server."""
    entry = server.store.entry(session._state.edit.id)
    found = server.store.read(entry, 0, entry.tokens, range(server.geometry.layers), range(server.geometry.kv_heads))
    return [part.transpose(1, 2) for part in found]


def same_states(server, session, context):
    mine = states_of(server, session)
    length = mine[0].shape[2]
    for part, name in zip(mine, ("keys", "values"), strict=True):
        theirs = torch.stack([getattr(layer, name)[0, :, :length] for layer in context.cache.layers])
        assert torch.allclose(part, theirs, atol=2e-4), (part - theirs).abs().max()


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    window=st.sampled_from([None, (2, 16), (0, 5), (3, 0), (0, 0)]),
    repair=st.sampled_from([0, 1, 7, 30]),
    data=st.data(),
)
def test_erasing_leaves_the_states_that_transformers_steering_leaves(connect, lengths, window, repair, data):
    server, session, context = connect(window, repair)
    tokens = make_tokenizer().encode(WORDS * 20, add_special_tokens=False)
    spans, at = [], 0
    for length in lengths:
        ids, at = tokens[at : at + length], at + length
        assert session.append(ids) == context.append(ids)
        spans.append(Span(at - length, at))
    first = data.draw(st.lists(st.sampled_from(spans[:-1]), min_size=1, unique=True))
    session.erase(first)
    context.erase(first)
    same_states(server, session, context)
    more = tokens[at : at + 9]
    session.append(more)
    context.append(more)
    if left := [span for span in spans if span not in first]:
        second = data.draw(st.sampled_from(left))
        session.erase(second)
        context.erase(second)
        same_states(server, session, context)
    same_answer(session, context)


def test_no_erased_id_is_sent_again_and_none_of_its_states_are_kept(connect):
    server, session, _ = connect()
    session.append(WORDS)
    secret = session.append("secret QJZ!")
    ids = list(session._state.ids[secret.slice])
    session.append(WORDS)
    session.erase(secret, undo=False)
    server.prompts.clear()
    session.generate(" is it", max_new_tokens=3)
    tombstones = server.prompts[0][secret.slice]
    assert tombstones != ids
    assert "QJZ" not in session.text
    assert "QJZ" not in repr(vars(session))
    assert server.store.ids() == [session._state.edit.id]


def test_only_edits_that_are_served_or_can_be_restored_stay_on_the_server(connect):
    server, session, _ = connect()
    spans = [session.append(WORDS) for _ in range(4)]
    for span in spans[:3]:
        before = session._state.edit
        session.erase(span)
        assert set(server.store.ids()) == {edit.id for edit in (before, session._state.edit) if edit}


def test_two_erases_of_the_same_text_have_other_tombstones_and_another_salt(connect):
    edits, stand_ins = [], []
    for _ in range(2):
        _, session, _ = connect()
        session.append(WORDS)
        span = session.append(WORDS)
        session.append(WORDS)
        edits.append(session.erase(span).edit)
        stand_ins.append(session._state.ids[span.slice])
    assert edits[0].salt != edits[1].salt
    assert stand_ins[0] != stand_ins[1]


def test_a_span_that_ends_the_context_is_cut_off_without_a_request(connect):
    server, session, context = connect()
    for ctx in (session, context):
        ctx.append(WORDS)
        last = ctx.append(" a wrong end")
        receipt = ctx.erase(last)
        assert receipt.exact
    assert server.prompts == [[0]]
    assert session.append(" and so on") == context.append(" and so on")
    same_answer(session, context)


def test_cutting_off_the_end_behind_an_edit_keeps_the_edit(connect):
    server, session, context = connect()
    for ctx in (session, context):
        ctx.append(WORDS)
        stale = ctx.append("the code is 1234; ")
        ctx.append(WORDS)
        last = ctx.append("the car is red; ")
        ctx.erase(stale)
        ctx.erase(last)
    same_states(server, session, context)
    same_answer(session, context)


def test_restoring_brings_the_text_back_and_keeps_what_was_appended_since(connect):
    _, session, context = connect()
    session.append(WORDS)
    span = session.append("the code is 1234; ")
    session.append(WORDS)
    before = session.text
    receipt = session.erase(span)
    session.append(" and so on")
    session.restore(receipt)
    assert session.text == before + " and so on"
    context.append(session._state.ids)
    same_answer(session, context)
    with pytest.raises(kv.RestoreError):
        session.restore(receipt)


def test_only_the_latest_erase_with_undo_can_be_restored(connect):
    _, session, _ = connect()
    spans = [session.append(WORDS) for _ in range(4)]
    first = session.erase(spans[0])
    second = session.erase(spans[1], undo=False)
    for receipt in (first, second):
        with pytest.raises(kv.RestoreError):
            session.restore(receipt)


def test_a_failed_erase_leaves_the_session_as_it_was(connect):
    server, session, _ = connect()
    session.append(WORDS)
    span = session.append(WORDS)
    session.append(WORDS)
    before = session._state
    server.broken = True
    with pytest.raises(kv.errors.EngineError):
        session.erase(span)
    assert session._state is before
    server.broken = False
    session.erase(span)


@pytest.mark.parametrize("what", ["not there", Span(0, 10_000), "", 7])
def test_what_cannot_be_found_cannot_be_erased(connect, what):
    _, session, _ = connect()
    session.append(WORDS)
    with pytest.raises((kv.SpanError, TypeError)):
        session.erase(what)


def test_an_erased_span_cannot_be_erased_again(connect):
    _, session, _ = connect()
    session.append(WORDS)
    span = session.append(WORDS)
    session.append(WORDS)
    session.erase(span)
    with pytest.raises(kv.SpanError, match="erased already"):
        session.erase(span)


def test_messages_are_erased_by_id_and_answers_are_kept(connect):
    _, session, context = connect()
    for ctx in (session, context):
        ctx.append_message("user", "the color of the car?")
        ctx.append_message("tool", "the car is blue", id="call-1")
        ctx.append_message("tool", "the car is fast", id="call-2")
    assert session.text == context.text
    session.erase("call-1")
    context.erase("call-1")
    assert session.chat("is it fast?", max_new_tokens=6) == context.generate("is it fast?", max_new_tokens=6, keep=True)
    assert session.text == context.text
    assert len(session) == len(context)
    with pytest.raises(kv.ContextError, match="call-2"):
        session.append_message("tool", "again", id="call-2")


def test_an_answer_that_the_template_shows_otherwise_leaves_the_chat_as_it_was(connect, monkeypatch):
    _, session, _ = connect()
    session.append_message("user", "hello")
    shown = "{{ m['content'] | reverse if m['role'] == 'assistant' else m['content'] }}"
    template = session.tokenizer.chat_template
    monkeypatch.setattr(session.tokenizer, "chat_template", template.replace("{{ m['content'] }}", shown))
    before, messages = session.text, list(session._chat)
    with pytest.raises(kv.ContextError, match="changes the content of 'assistant'"):
        session.chat("is it fast?", max_new_tokens=6)
    assert session.text == before
    assert list(session._chat) == messages


def test_any_client_can_send_what_a_session_would_send(connect):
    server, session, _ = connect()
    session.append(WORDS)
    span = session.append(WORDS)
    session.append(WORDS)
    session.erase(span)
    said = session.request(" is it")
    body = {"model": "tiny", "max_tokens": 5, "prompt": said["prompt"], **said["extra_body"]}
    answer = server.call("/v1/completions", body)["choices"][0]["token_ids"]
    assert answer == session.complete(" is it", max_new_tokens=5).ids


def test_closing_drops_the_edited_context(connect):
    server, session, _ = connect()
    session.append(WORDS)
    span = session.append(WORDS)
    session.append(WORDS)
    session.erase(span)
    session.close()
    assert server.store.ids() == []
    assert len(session) == 0


def otherwise(call, path, change):
    """A server's `call` whose answers about something are of another version."""

    def changed(self, asked, body=None):
        answer = call(self, asked, body)
        if asked == path:
            change(answer)
        return answer

    return changed


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/models", lambda answer: answer.pop("data")),
        ("/tokenize", lambda answer: answer.pop("tokens")),
        ("/v1/completions", lambda answer: answer.pop("choices")),
        ("/v1/completions", lambda answer: said_of(answer).get("about", {}).pop("window", None)),
        ("/v1/completions", lambda answer: said_of(answer).get("about", {}).pop("repair", None)),
        ("/v1/completions", lambda answer: said_of(answer).update(about=7)),
        ("/v1/completions", lambda answer: said_of(answer).update(about="ready")),
    ],
)
def test_a_server_of_another_version_is_named_when_a_session_begins(connect, monkeypatch, path, change):
    connect()
    monkeypatch.setattr(StandIn, "call", otherwise(StandIn.call, path, change))
    with pytest.raises(EngineError, match="otherwise than"):
        VLLMSession("http://stand-in", tokenizer=make_tokenizer())


@pytest.mark.parametrize("name", ["saved", "edit"])
@pytest.mark.parametrize("value", [None, 7, {"id": "0" * 32}])
def test_a_server_that_answers_an_erase_otherwise_leaves_the_session_as_it_was(connect, monkeypatch, name, value):
    _, session, _ = connect()
    session.append(WORDS)
    span = session.append("and the secret is 77")
    session.append(WORDS)
    before = session.text

    def change(answer):
        if name in said_of(answer):
            said_of(answer)[name] = value

    monkeypatch.setattr(StandIn, "call", otherwise(StandIn.call, "/v1/completions", change))
    with pytest.raises(EngineError):
        session.erase(span)
    assert (session.text, session._state.edit) == (before, None)


def said_of(answer):
    return answer.get("kv_transfer_params", {}).get(KEY, {})


def test_a_server_without_the_connector_is_named(connect, monkeypatch):
    server, _, _ = connect()
    monkeypatch.setattr(server, "about", None)
    with pytest.raises(kv.errors.EngineError, match="without kveraser's connector"):
        VLLMSession("http://stand-in", tokenizer=make_tokenizer())


def test_a_server_without_the_eraser_is_named(connect):
    connect()
    with pytest.raises(kv.errors.EngineError, match="--lora-modules"):
        VLLMSession("http://stand-in", tokenizer=make_tokenizer(), eraser="another")


def test_the_end_of_a_context_is_cropped_with_the_steered_slots_before_it():
    assert split_tail((Span(4, 6), Span(8, 10)), (), 10) == ((Span(4, 6),), 8)
    assert split_tail((Span(8, 10),), (Span(5, 8),), 10) == ((), 5)
    assert split_tail((Span(3, 5), Span(8, 10)), (Span(5, 8),), 10) == ((), 3)
    assert split_tail((Span(0, 4),), (Span(6, 7),), 9) == ((Span(0, 4),), 9)
