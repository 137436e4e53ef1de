"""Text and chat messages: spans by text and by id, rendering, generation, files, purging."""

from __future__ import annotations

import gc
import json

import pytest
import torch

import kveraser as kv
from conftest import same
from files_helpers import readable_bytes
from kinds import EVERY_KIND

pytestmark = pytest.mark.parametrize("kind", EVERY_KIND)


def test_append_returns_the_span_of_what_was_appended(kind):
    ctx = kind.text_context()
    first = ctx.append("the code is 1234.\n")
    second = ctx.append("the car is blue.")
    assert first.end == second.start
    assert ctx.text == "the code is 1234.\nthe car is blue."
    assert ctx.text_of(second) == "the car is blue."


def test_erasing_by_text_takes_the_one_place_of_it(kind):
    ctx = kind.text_context()
    ctx.append("the code is 1234. the car is blue. it is fast.")
    receipt = ctx.erase(" the car is blue.", "full-recompute")
    assert ctx.text == "the code is 1234. it is fast."
    assert ctx.text_of(receipt.span) == " the car is blue."
    with pytest.raises(kv.SpanError, match="not in the context"):
        ctx.erase("the car is blue")


@pytest.mark.parametrize(
    ("text", "words"),
    [("the", "occurs more than once"), ("red", "not in the context"), ("", "empty")],
)
def test_a_text_not_found_once_is_refused_and_nothing_changes(kind, text, words):
    ctx = kind.text_context()
    ctx.append("the code, the car, the door")
    before = kind.states(ctx)
    with pytest.raises(kv.SpanError, match=words):
        ctx.erase(text)
    assert same(kind.states(ctx), before)


@pytest.mark.parametrize(
    ("what", "words"),
    [([5], "int 5"), (5, "int 5"), (None, "NoneType None"), ((3, 7), r"int 3\. Write kv.Span"), (3.5, "float 3.5"),
     ([(3, 7)], r"\(3, 7\)"), ([], "no span")],
)  # fmt: skip
def test_something_that_is_neither_span_nor_text_is_refused_with_its_value_and_nothing_changes(kind, what, words):
    ctx = kind.text_context()
    ctx.append("the code of the door")
    before = kind.states(ctx)
    for call in (ctx.erase, ctx.readers):
        with pytest.raises(kv.SpanError, match=words):
            call(what)
    assert same(kind.states(ctx), before)
    assert ctx.receipts == ()


@pytest.mark.parametrize("receipt", [None, "x", 5])
def test_something_that_is_no_receipt_is_refused(kind, receipt):
    ctx = kind.text_context()
    ctx.append("the code of the door")
    for call in (ctx.restore, ctx.purge):
        with pytest.raises(kv.RestoreError, match=f"got {receipt!r}"):
            call(receipt)


def test_messages_are_rendered_as_the_template_does_and_found_by_id(kind):
    ctx = kind.text_context()
    ctx.append_message("user", "what is the code?")
    span = ctx.append_message("tool", "the code is 1234", id="call-1")
    ctx.append_message("assistant", "it is 1234")
    messages = [
        {"role": "user", "content": "what is the code?"},
        {"role": "tool", "content": "the code is 1234"},
        {"role": "assistant", "content": "it is 1234"},
    ]
    assert ctx.text == ctx.tokenizer.apply_chat_template(messages, tokenize=False)
    assert ctx.text_of(span) == "the code is 1234"
    receipt = ctx.erase("call-1")
    assert receipt.span == span


@pytest.mark.parametrize(
    "content", ["plain", "  spaces around  ", "two\nlines\n", "çödé ✓ 🎈", "</s> inside", "s", "tool"]
)
def test_the_span_of_a_message_is_its_content_alone(kind, content):
    ctx = kind.text_context()
    ctx.append_message("user", "hello")
    span = ctx.append_message("tool", content)
    assert content.strip() in ctx.text_of(span)
    assert ctx.text_of(kv.Span(span.start - 5, span.start)).endswith("tool\n")
    assert "<s>" not in ctx.text_of(span)


def test_a_message_that_cannot_be_entered_is_refused(kind):
    ctx = kind.text_context()
    ctx.append_message("user", "hello", id="a")
    for call, words in (
        (lambda: ctx.append_message("user", "again", id="a"), "id 'a' already"),
        (lambda: ctx.append_message("user", " \n"), "no content"),
        (lambda: ctx.append(""), "no tokens"),
    ):
        with pytest.raises(kv.ContextError, match=words):
            call()
    assert len(ctx.messages) == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "not prefix-stable"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes the content"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_be_cached_are_refused_by_name(kind, monkeypatch, template, words):
    ctx = kind.text_context()
    monkeypatch.setattr(ctx.tokenizer, "chat_template", template)
    with pytest.raises(kv.ContextError, match=words):
        ctx.append_message("user", "hello")
        ctx.append_message("user", "there")


def test_generating_in_a_chat_asks_as_a_user(kind):
    ctx = kind.text_context()
    ctx.append_message("user", "hello")
    ctx.append_message("assistant", "hi")
    messages = [("user", "hello"), ("assistant", "hi"), ("user", "what now?")]
    text = ctx.tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in messages], tokenize=False, add_generation_prompt=True
    )
    plain = kind.text_context()
    expected = plain.generate(text, max_new_tokens=5)
    before = kind.states(ctx)
    assert ctx.generate("what now?", max_new_tokens=5) == expected
    assert same(kind.states(ctx), before)
    assert ctx.generate("what now?", max_new_tokens=5, chat=False) is not None


def test_a_kept_exchange_becomes_part_of_the_chat(kind):
    ctx = kind.text_context()
    ctx.append_message("user", "hello")
    reply = ctx.generate("what now?", max_new_tokens=4, keep=True)
    assert [message.role for message, _ in ctx.messages] == ["user", "user", "assistant"]
    assert reply.strip() in ctx.text
    ctx.append_message("user", "go on", id="later")
    assert ctx.text.endswith("<s>user\ngo on</s>\n")
    ctx.erase("later")
    for message, span in ctx.messages[:2]:
        assert ctx.text_of(span) == message.content


@pytest.mark.parametrize("call", ["generate", "reply"])
def test_a_reply_that_the_template_shows_otherwise_leaves_the_chat_as_it_was(kind, call, monkeypatch):
    ctx = kind.text_context()
    shown = "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}"
    monkeypatch.setattr(
        ctx.tokenizer, "chat_template", ctx.tokenizer.chat_template.replace("{{ m['content'] }}", shown)
    )
    ctx.append_message("user", "hello")
    before, ids, messages = kind.states(ctx), ctx.live_ids, list(ctx.messages)
    monkeypatch.setattr(ctx, "decode", lambda answer: "<think>the car</think>it is fast")
    with pytest.raises(kv.ContextError, match="changes the content of 'assistant'"):
        getattr(ctx, call)("what now?", max_new_tokens=4, keep=True)
    assert list(ctx.messages) == messages
    assert ctx.live_ids == ids
    assert len(ctx) == len(ids) == ctx.backend.length
    assert same(kind.states(ctx), before)


def test_logits_of_text_leave_the_context_as_it_is(kind):
    ctx = kind.text_context()
    ctx.append("the code is 1234")
    before = kind.states(ctx)
    logits = ctx.logits(" the car")
    assert logits.shape == (len(ctx.encode(" the car")), ctx.backend.vocabulary)
    assert same(kind.states(ctx), before)


def test_a_question_without_content_is_refused_and_nothing_changes(kind):
    ctx = kind.text_context()
    ctx.append_message("user", "hello")
    with pytest.raises(kv.ContextError, match="no content"):
        ctx.generate(" ", keep=True)
    assert len(ctx.messages) == 1


@pytest.mark.parametrize("call", ["generate", "reply", "prompt_ids"])
def test_ids_are_no_users_message(kind, call):
    ctx = kind.text_context()
    ctx.append_message("user", "hello")
    before = ctx.live_ids
    with pytest.raises(kv.OptionError, match=r"chat=True.*3 token ids"):
        getattr(ctx, call)([5, 6, 7], chat=True)
    assert ctx.live_ids == before


def test_tokens_one_by_one_give_the_logits_of_a_prefill(kind):
    ctx, plain = kind.text_context(), kind.text_context()
    ids = ctx.encode("the code of the door is 1234")
    plain.append(ids[:4])
    rows = [ctx.advance(ids[:5]), *(ctx.advance([token]) for token in ids[5:])]
    assert torch.allclose(torch.stack(rows), plain.logits(ids[4:]), atol=1e-3)
    assert ctx.live_ids == ids
    with pytest.raises(kv.ContextError, match="no tokens"):
        ctx.advance([])


# -- files -----------------------------------------------------------------------------------------------------------


def session(kind, tmp_path):
    ctx = kind.text_context()
    ctx.append_message("user", "what is the code?")
    ctx.append_message("tool", "the code is 1234", id="call-1")
    ctx.append_message("tool", "the car is blue", id="call-2")
    ctx.append_message("user", "go on")
    ctx.erase("call-1")
    ctx.save(tmp_path / "s")
    return ctx


def test_a_saved_context_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    ctx = session(kind, tmp_path)
    loaded = kind.load(tmp_path / "s", ctx)
    assert same(kind.states(loaded), kind.states(ctx))
    assert loaded.text == ctx.text
    assert torch.equal(loaded.token_ids, ctx.token_ids)
    assert loaded.erased == ctx.erased
    assert not loaded.exact
    assert loaded.generate("and?", max_new_tokens=5) == ctx.generate("and?", max_new_tokens=5)
    for each in (ctx, loaded):
        each.erase("call-2")
        each.repair()
    assert same(kind.states(loaded), kind.states(ctx))
    report = loaded.restore(loaded.receipts[0])
    assert report.exact
    assert "the code is 1234" in loaded.text


def test_saving_again_replaces_the_session_and_leaves_no_other_file(kind, tmp_path):
    ctx = session(kind, tmp_path)
    ctx.append_message("user", "more")
    ctx.save(tmp_path / "s")
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert kind.load(tmp_path / "s", ctx).text == ctx.text


def test_an_empty_context_can_be_saved_and_loaded(kind, tmp_path):
    ctx = kind.text_context()
    ctx.save(tmp_path / "s")
    loaded = kind.load(tmp_path / "s", ctx)
    assert len(loaded) == 0
    assert loaded.append("the code")


def _change(file, change):
    file.write_bytes(change(file.read_bytes()))


def _head(change):
    """Changes the line of a saved session that anybody can read."""

    def changed(data):
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        change(head)
        return json.dumps(head).encode() + b"\n" + rest

    return lambda folder: _change(folder / "session.kveraser", changed)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _change(f / "session.kveraser", lambda d: d[:-10]), "truncated or altered"),
        (lambda f: _change(f / "session.kveraser", lambda d: d[:-1] + bytes([d[-1] ^ 1])), "truncated or altered"),
        (lambda f: _change(f / "session.kveraser", lambda d: d + b"x"), "altered"),
        (lambda f: (f / "session.kveraser").unlink(), "session.kveraser is missing"),
        (lambda f: (f / "session.key").unlink(), "session.key is missing"),
        (lambda f: _change(f / "session.key", lambda d: bytes(len(d))), "key .* is not in"),
        (lambda f: _change(f / "session.kveraser", lambda d: b"{"), "cannot be read"),
        (_head(lambda d: d.update(parts=[5, 5])), "truncated or altered"),
        (_head(lambda d: d.update(more=1)), "truncated or altered"),
        (_head(lambda d: d.update(format=99)), "format 99"),
        (_head(lambda d: d.pop("salt")), "cannot be read"),
    ],
)
def test_a_damaged_session_is_refused_by_name(kind, tmp_path, damage, words):
    ctx = session(kind, tmp_path)
    damage(tmp_path / "s")
    with pytest.raises(kv.SessionFileError, match=words):
        kind.load(tmp_path / "s", ctx)


def test_a_save_that_fails_leaves_the_old_session_readable(kind, tmp_path, monkeypatch):
    ctx = session(kind, tmp_path)
    text = ctx.text
    ctx.append_message("user", "more")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("kveraser.files.disk.sync", full)
    with pytest.raises(OSError, match="no space"):
        ctx.save(tmp_path / "s")
    monkeypatch.undo()
    assert kind.load(tmp_path / "s", ctx).text == text


# -- purging ---------------------------------------------------------------------------------------------------------

SECRET = "xylophone quartz"


def reachable(root):
    """Every object that can be reached from `root`, without modules, types and the model itself."""
    seen, queue = {}, [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type | type(json) | torch.nn.Module) or callable(item):
            continue
        seen[id(item)] = item
        queue += gc.get_referents(item)
    return list(seen.values())


@pytest.mark.parametrize("method", ["kveraser", "delete-and-shift", "full-recompute", "local-suffix-repair"])
def test_after_a_purge_nothing_of_the_span_is_left_in_the_object_or_its_files(kind, method, tmp_path):
    ctx = kind.text_context()
    ctx.append_message("user", "hello there")
    span = ctx.append_message("tool", SECRET, id="secret")
    ctx.append_message("user", "the car is blue and it is fast")
    held = ctx.erase("the car is blue", "delete-and-shift")  # its undo states have seen the secret
    secret_ids = ctx._ids.view[span.slice].tolist()
    cached = kind.of_slots(ctx, span)
    receipt = ctx.erase("secret", method)
    steered = kind.of_slots(ctx, span) if method == "kveraser" else []
    ctx.save(tmp_path / "s")
    assert SECRET.encode() in readable_bytes((tmp_path / "s").iterdir())
    undo = held.undo
    ctx.purge(receipt)

    assert ctx.exact
    assert undo.regions == []
    everything = [*reachable(ctx), *reachable(receipt), *reachable(held)]
    for item in everything:
        if isinstance(item, str):
            assert SECRET not in item
        if isinstance(item, torch.Tensor) and item.dtype == torch.long and item.ndim:
            flat = item.flatten().tolist()
            assert all(flat[i : i + len(secret_ids)] != secret_ids for i in range(len(flat)))
        if isinstance(item, torch.Tensor) and item.ndim and item.is_floating_point():
            assert not kind.holds(item, cached)
            assert not kind.holds(item, steered)
    written = readable_bytes((tmp_path / "s").iterdir())
    assert b"hello there" in written
    assert SECRET.encode() not in written
    for old in kind.in_files(cached):
        assert old not in written
    assert len(list((tmp_path / "s").iterdir())) == 2
    loaded = kind.load(tmp_path / "s", ctx)
    assert SECRET not in loaded.text
    with pytest.raises(kv.RestoreError, match="purge"):
        loaded.restore(receipt)
    ctx.append_message("user", "go on")
    assert SECRET not in ctx.text
    assert ctx.text_of(span) == ""
