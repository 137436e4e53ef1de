"""Text and chat messages: spans by text and by id, rendering, generation, files, purging."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import CHAT_TEMPLATE, build, make_config, make_tokenizer, random_eraser, same, states, text_model
from kveraser.context.text import decode, occurrences


def context(**options):
    model = text_model()
    return kv.ErasableContext(model, make_tokenizer(), random_eraser(model), **options)


def test_append_returns_the_span_of_what_was_appended():
    ctx = context()
    first = ctx.append("the code is 1234.\n")
    second = ctx.append("the car is blue.")
    assert first.end == second.start
    assert ctx.text == "the code is 1234.\nthe car is blue."
    assert ctx.text_of(second) == "the car is blue."


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


def test_erasing_by_text_takes_the_one_place_of_it():
    ctx = context()
    ctx.append("the code is 1234. the car is blue. it is fast.")
    receipt = ctx.erase(" the car is blue.", "full-recompute")
    assert ctx.text == "the code is 1234. it is fast."
    assert ctx.text_of(receipt.span) == " the car is blue."
    with pytest.raises(kv.SpanError, match="not in the context"):
        ctx.erase("the car is blue")


@pytest.mark.parametrize(
    ("text", "words"), [("the", r"occurs 3 times, at \["), ("red", "not in the context"), ("", "empty")]
)
def test_a_text_not_found_once_is_refused_and_nothing_changes(text, words):
    ctx = context()
    ctx.append("the code, the car, the door")
    before = states(ctx.cache)
    with pytest.raises(kv.SpanError, match=words):
        ctx.erase(text)
    assert same(states(ctx.cache), before)


def test_something_that_is_neither_span_nor_text_is_refused():
    ctx = context()
    ctx.append("the code")
    with pytest.raises(kv.SpanError, match="int 5"):
        ctx.erase([5])


def test_messages_are_rendered_as_the_template_does_and_found_by_id():
    ctx = context()
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
def test_the_span_of_a_message_is_its_content_alone(content):
    ctx = context()
    ctx.append_message("user", "hello")
    span = ctx.append_message("tool", content)
    assert content.strip() in ctx.text_of(span)
    assert ctx.text_of(kv.Span(span.start - 5, span.start)).endswith("tool\n")
    assert "<s>" not in ctx.text_of(span)


def test_a_message_that_cannot_be_entered_is_refused():
    ctx = context()
    ctx.append_message("user", "hello", id="a")
    for call, words in (
        (lambda: ctx.append_message("user", "again", id="a"), "id 'a' already"),
        (lambda: ctx.append_message("user", " \n"), "no content"),
        (lambda: ctx.append(""), "no tokens"),
    ):
        with pytest.raises(kv.ContextError, match=words):
            call()
    assert len(ctx._messages) == 1


class Templated:
    """The test tokenizer with another chat template."""

    def __init__(self, template):
        self.template = template

    def __enter__(self):
        tokenizer = make_tokenizer()
        self.old, tokenizer.chat_template = tokenizer.chat_template, self.template
        return tokenizer

    def __exit__(self, *_):
        make_tokenizer().chat_template = self.old


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "not prefix-stable"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes the content"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_be_cached_are_refused_by_name(template, words):
    with Templated(template):
        ctx = context()
        with pytest.raises(kv.ContextError, match=words):
            ctx.append_message("user", "hello")
            ctx.append_message("user", "there")


def test_generating_in_a_chat_asks_as_a_user():
    ctx = context()
    ctx.append_message("user", "hello")
    ctx.append_message("assistant", "hi")
    messages = [("user", "hello"), ("assistant", "hi"), ("user", "what now?")]
    text = ctx.tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in messages], tokenize=False, add_generation_prompt=True
    )
    plain = kv.ErasableContext(ctx.model, ctx.tokenizer)
    expected = plain.generate(text, max_new_tokens=5)
    before = states(ctx.cache)
    assert ctx.generate("what now?", max_new_tokens=5) == expected
    assert same(states(ctx.cache), before)
    assert ctx.generate("what now?", max_new_tokens=5, chat=False) is not None


def test_a_kept_exchange_becomes_part_of_the_chat():
    ctx = context()
    ctx.append_message("user", "hello")
    reply = ctx.generate("what now?", max_new_tokens=4, keep=True)
    assert [message.role for message in ctx._messages] == ["user", "user", "assistant"]
    assert reply.strip() in ctx.text
    ctx.append_message("user", "go on", id="later")
    assert ctx.text.endswith("<s>user\ngo on</s>\n")
    ctx.erase("later")
    for span, message in zip(ctx._message_spans[:2], ctx._messages[:2], strict=True):
        assert ctx.text_of(span) == message.content


def test_logits_of_text_leave_the_context_as_it_is():
    ctx = context()
    ctx.append("the code is 1234")
    before = states(ctx.cache)
    logits = ctx.logits(" the car")
    assert logits.shape == (len(ctx.encode(" the car")), len(make_tokenizer()))
    assert same(states(ctx.cache), before)


def test_a_context_without_tokenizer_takes_ids_and_says_so_about_text():
    ctx = kv.ErasableContext(text_model())
    ctx.append([5, 6, 7])
    with pytest.raises(kv.ContextError, match="no tokenizer"):
        ctx.append("text")


def test_a_model_that_cannot_be_edited_is_refused_at_once():
    model = build(make_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(kv.UnsupportedCacheError, match="dynamic-NTK"):
        kv.ErasableContext(model)


def test_a_question_without_content_is_refused_and_nothing_changes():
    ctx = context()
    ctx.append_message("user", "hello")
    with pytest.raises(kv.ContextError, match="no content"):
        ctx.generate(" ", keep=True)
    assert len(ctx.messages) == 1


def test_tokens_one_by_one_give_the_logits_of_a_prefill():
    ctx, plain = context(), context()
    ids = ctx.encode("the code of the door is 1234")
    plain.append(ids[:4])
    rows = [ctx.advance(ids[:5]), *(ctx.advance([token]) for token in ids[5:])]
    assert torch.allclose(torch.stack(rows), plain.logits(ids[4:]), atol=1e-4)
    assert ctx.live_ids == ids
    with pytest.raises(kv.ContextError, match="no tokens"):
        ctx.advance([])


@pytest.mark.parametrize("take", [False, True])
def test_a_prefix_is_a_context_of_its_own(take):
    ctx = context()
    ctx.append("the code of the door is 1234. the car is blue and fast.")
    ids, before = ctx.live_ids, states(ctx.cache)
    branch = ctx.prefix(10, take=take)
    assert branch.live_ids == ids[:10]
    assert same(states(branch.cache), [tensor[:, :, :10] for tensor in before])
    branch.append("it is fast")
    assert len(ctx) == (0 if take else len(ids))
    assert take or same(states(ctx.cache), before)
    ctx.append("more")
    branch.erase(kv.Span(3, 6))
    with pytest.raises(kv.ContextError, match="first 3 tokens are exact"):
        branch.prefix(4)


# -- files -----------------------------------------------------------------------------------------------------------


def session(tmp_path):
    ctx = context()
    ctx.append_message("user", "what is the code?")
    ctx.append_message("tool", "the code is 1234", id="call-1")
    ctx.append_message("tool", "the car is blue", id="call-2")
    ctx.append_message("user", "go on")
    ctx.erase("call-1")
    ctx.save(tmp_path / "s")
    return ctx


def test_a_saved_context_goes_on_as_if_nothing_had_happened(tmp_path):
    ctx = session(tmp_path)
    loaded = kv.ErasableContext.load(tmp_path / "s", ctx.model, ctx.tokenizer, ctx.eraser)
    assert same(states(loaded.cache), states(ctx.cache))
    assert loaded.text == ctx.text
    assert torch.equal(loaded.token_ids, ctx.token_ids)
    assert loaded.erased == ctx.erased
    assert not loaded.exact
    assert loaded.generate("and?", max_new_tokens=5) == ctx.generate("and?", max_new_tokens=5)
    for each in (ctx, loaded):
        each.erase("call-2")
        each.repair()
    assert same(states(loaded.cache), states(ctx.cache))
    report = loaded.restore(loaded.receipts[0])
    assert report.exact
    assert "the code is 1234" in loaded.text


def test_saving_again_replaces_the_session_and_leaves_no_other_file(tmp_path):
    ctx = session(tmp_path)
    ctx.append_message("user", "more")
    ctx.save(tmp_path / "s")
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert kv.ErasableContext.load(tmp_path / "s", ctx.model, ctx.tokenizer).text == ctx.text


def test_an_empty_context_can_be_saved_and_loaded(tmp_path):
    ctx = context()
    ctx.save(tmp_path / "s")
    loaded = kv.ErasableContext.load(tmp_path / "s", ctx.model, ctx.tokenizer)
    assert len(loaded) == 0
    assert loaded.append("the code")


def _states_file(folder):
    return next(folder.glob("states-*.safetensors"))


def _edit_index(folder, change):
    data = json.loads((folder / "session.json").read_text())
    change(data)
    (folder / "session.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _states_file(f).write_bytes(_states_file(f).read_bytes()[:-10]), "truncated or altered"),
        (lambda f: _states_file(f).write_bytes(_states_file(f).read_bytes()[:-1] + b"x"), "truncated or altered"),
        (lambda f: _states_file(f).unlink(), "is missing"),
        (lambda f: (f / "session.json").unlink(), "is missing"),
        (lambda f: (f / "session.json").write_text("{"), "cannot be read"),
        (lambda f: _edit_index(f, lambda d: d["session"].update(length=1)), "was altered"),
        (lambda f: _edit_index(f, lambda d: d.update(format=99)), "format 99"),
        (lambda f: _edit_index(f, lambda d: d.pop("session")), "cannot be read"),
    ],
)
def test_a_damaged_session_is_refused_by_name(tmp_path, damage, words):
    ctx = session(tmp_path)
    damage(tmp_path / "s")
    with pytest.raises(kv.SessionFileError, match=words):
        kv.ErasableContext.load(tmp_path / "s", ctx.model, ctx.tokenizer)


def test_a_session_of_another_model_or_type_is_refused(tmp_path):
    ctx = session(tmp_path)
    other = build(make_config("llama", vocab_size=len(make_tokenizer())), seed=9)
    with pytest.raises(kv.SessionFileError, match="another model"):
        kv.ErasableContext.load(tmp_path / "s", other, ctx.tokenizer)
    with pytest.raises(kv.SessionFileError, match="bfloat16"):
        kv.ErasableContext.load(tmp_path / "s", text_model(torch.bfloat16), ctx.tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(kv.SessionFileError, match="is a file"):
        ctx.save(tmp_path / "file")


def test_a_save_that_fails_leaves_the_old_session_readable(tmp_path, monkeypatch):
    ctx = session(tmp_path)
    text = ctx.text
    ctx.append_message("user", "more")
    import kveraser.files

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(kveraser.files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        ctx.save(tmp_path / "s")
    monkeypatch.undo()
    assert kv.ErasableContext.load(tmp_path / "s", ctx.model, ctx.tokenizer).text == text


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
def test_after_a_purge_nothing_of_the_span_is_left_in_the_object_or_its_files(method, tmp_path):
    ctx = context()
    ctx.append_message("user", "hello there")
    span = ctx.append_message("tool", SECRET, id="secret")
    ctx.append_message("user", "the car is blue and it is fast")
    held = ctx.erase("the car is blue", "delete-and-shift")  # its undo states have seen the secret
    secret_ids = ctx._ids.view[span.slice].tolist()
    # Layer 0's values depend on the token alone, and the secret's letters occur elsewhere: look at the layers above.
    cached = [tensor[:, :, span.slice].clone() for tensor in states(ctx.cache)[2:]]
    receipt = ctx.erase("secret", method)
    steered = [tensor[:, :, span.slice].clone() for tensor in states(ctx.cache)[2:]]
    ctx.save(tmp_path / "s")
    assert SECRET in (tmp_path / "s" / "session.json").read_text()
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
        if isinstance(item, torch.Tensor) and item.ndim == 4 and item.is_floating_point():
            whole = item.untyped_storage().nbytes() // item.element_size()
            spare = torch.empty(0, dtype=item.dtype).set_(item.untyped_storage(), 0, (whole,))
            for old in (*cached, *(steered if method == "kveraser" else [])):
                assert not torch.isin(old.flatten()[old.flatten() != 0], spare).any()
    written = b"".join(file.read_bytes() for file in sorted((tmp_path / "s").iterdir()))
    assert SECRET.encode() not in written
    for old in cached:
        assert old[0, 0, 0].numpy().tobytes() not in written
    assert len(list((tmp_path / "s").iterdir())) == 2
    loaded = kv.ErasableContext.load(tmp_path / "s", ctx.model, ctx.tokenizer)
    assert SECRET not in loaded.text
    with pytest.raises(kv.RestoreError, match="purge"):
        loaded.restore(receipt)
    ctx.append_message("user", "go on")
    assert SECRET not in ctx.text
    assert ctx.text_of(span) == ""
    assert CHAT_TEMPLATE
