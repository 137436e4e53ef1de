"""What must be forgotten is in no cached conversation of its owner any more: not in ids, states or files."""

from __future__ import annotations

import threading

import pytest
from serving_helpers import NAME, TALK, ask, chat_ids, fresh, messages, servers, with_placeholder, without

from conftest import make_tokenizer
from kveraser.cache import GrowableLayer
from kveraser.errors import JobCancelledError
from kveraser.serving.completion import Prompt
from kveraser.serving.decoding import Sampling

SECRET = "the code is 1234 and it is fast"  # TALK[2]
WITH = TALK[:3] + TALK[4:]
CLEARED = with_placeholder(WITH, 2)


def held_in(service, owner=""):
    return service.submit(lambda job: service.store.conversations(owner)).future.result(5)


def said(service, owner=""):
    """All ids that the conversations of an owner still know, erased ones included."""
    return [make_tokenizer().decode(held.context._ids.view.tolist()) for held in held_in(service, owner)]


def wiped(held):
    """Whether nothing is left in memory behind a conversation's tokens."""
    layers = held.context.cache.layers
    assert all(isinstance(layer, GrowableLayer) for layer in layers)
    return all(not buffer[:, :, layer.get_seq_length() :].any() for layer in layers for buffer in layer._buffers)


@pytest.mark.parametrize("policy", ["exact", "kveraser", "auto"])
@pytest.mark.parametrize("earlier", [False, True])
def test_it_is_gone_from_every_conversation_of_its_owner_and_the_reply_is_exact(make_service, policy, earlier):
    service = make_service()
    ask(service, WITH)
    ask(service, [*WITH, ("user", "and now?")])
    other = [("user", "tell me of the car and the door"), ("assistant", f"so {SECRET}")]
    ask(service, other)
    ask(service, WITH, owner="another")
    if earlier:  # it was taken out before, without being forgotten
        assert not ask(service, [*CLEARED, ("assistant", "1"), ("user", "more")], "kveraser").reuse.exact
    reply = ask(service, CLEARED, policy, must_forget=(SECRET,))
    assert reply.reuse.exact
    assert reply.reuse.forgotten == 3
    assert reply.text == fresh(make_service, CLEARED).text
    assert not any(SECRET in text for text in said(service))
    assert SECRET in said(service, "another")[0]
    assert ask(service, WITH, owner="another").reuse.tokens_recomputed == 1


def test_what_was_cut_off_is_overwritten_in_memory(make_service, monkeypatch):
    service = make_service()
    ask(service, WITH)
    (before,) = held_in(service)
    buffers = [buffer for layer in before.context.cache.layers for buffer in layer._buffers]
    seen = []
    original = service._finder.prepare

    def prepare(*args):
        seen.extend(wiped(held) for held in held_in_worker())
        return original(*args)

    def held_in_worker():
        return service.store.conversations("")

    monkeypatch.setattr(service._finder, "prepare", prepare)
    keep = len(chat_ids(WITH[:2])) - len(make_tokenizer().encode("<s>assistant\n", add_special_tokens=False))
    states = [buffer[:, :, keep + 20 :].clone() for buffer in buffers]
    ask(service, CLEARED[:2], must_forget=(SECRET,))
    assert seen == [True]
    assert all(state.any() for state in states)
    assert not any(buffer[:, :, keep + 20 : keep + 60].any() for buffer in buffers)


def test_what_an_exact_request_dropped_before_is_overwritten_in_memory(make_service):
    service = make_service()
    ask(service, WITH)
    ask(service, without(WITH, 2))
    (held,) = held_in(service)
    assert SECRET not in said(service)[0]
    assert not wiped(held)  # the states of what it says no more
    assert ask(service, without(WITH, 2), must_forget=(SECRET,)).reuse.forgotten == 0
    assert [wiped(held) for held in held_in(service)] == [True]


def test_a_conversation_that_is_exact_again_keeps_its_states_and_loses_what_was_taken_out(make_service):
    service = make_service()
    ask(service, WITH)
    ask(service, without(WITH, 2), "kveraser")
    service.submit(lambda job: [held.context.repair() for held in service.store.conversations("")]).future.result(5)
    assert SECRET in said(service)[0]
    reply = ask(service, without(WITH, 2), must_forget=(SECRET,))
    assert (reply.reuse.forgotten, reply.reuse.tokens_recomputed) == (1, 1)
    assert SECRET not in said(service)[0]


@pytest.mark.parametrize("earlier", [False, True])
def test_on_disk_its_conversation_is_destroyed_and_others_stay(make_service, tmp_path, earlier):
    service = make_service(state_dir=tmp_path)
    ask(service, WITH)
    if earlier:
        ask(service, CLEARED, "kveraser")
    ask(service, [("user", "tell me of the car")])
    service.close()
    service = make_service(state_dir=tmp_path)
    count = len(list((tmp_path / "contexts").iterdir()))
    reply = ask(service, CLEARED, must_forget=(SECRET,))
    assert reply.reuse.tokens_reused < 10
    assert reply.reuse.forgotten == count - 1
    assert ask(service, [("user", "tell me of the car")]).reuse.method == "prefix"


def test_a_disk_that_refuses_is_told_and_asked_again(make_service, tmp_path, monkeypatch):
    service = on_disk_only(make_service, tmp_path)
    original = service.store._disk.remove

    def refuse(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(service.store._disk, "remove", refuse)
    with pytest.raises(OSError, match="Input"):
        ask(service, CLEARED, must_forget=(SECRET,))
    monkeypatch.setattr(service.store._disk, "remove", original)
    assert ask(service, CLEARED, must_forget=(SECRET,)).reuse.forgotten == 1


def on_disk_only(make_service, folder):
    """A service that was started again after a conversation with the secret."""
    service = make_service(state_dir=folder)
    ask(service, WITH)
    service.close()
    return make_service(state_dir=folder)


@pytest.mark.parametrize("step", ["context.session_folder.shred", "serving.contexts.cards.shred"])
def test_a_folder_that_was_destroyed_in_part_is_gone_on_with(make_service, tmp_path, monkeypatch, step):
    service = on_disk_only(make_service, tmp_path)

    def refuse(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"kveraser.{step}", refuse)
    with pytest.raises(OSError, match="Input"):
        ask(service, CLEARED, must_forget=(SECRET,))
    monkeypatch.undo()
    assert list((tmp_path / "contexts").iterdir())
    ask(service, CLEARED, must_forget=(SECRET,))
    assert not list((tmp_path / "contexts").iterdir())


def many_on_disk(make_service, folder):
    """A service that was started again after several conversations with the secret; and these."""
    service = make_service(state_dir=folder)
    talks = [[("user", f"{number}: {SECRET}, and {said} it is")] for number, (_, said) in enumerate(TALK)]
    for talk in talks:
        ask(service, talk)
    service.close()
    return make_service(state_dir=folder), talks


def forget_watched(service, monkeypatch, watch):
    """The job of a request that must forget the secret; `watch` is called with the job at every folder that is destroyed."""
    remove, jobs = service.store._disk.remove, []

    def watched(name):
        watch(jobs[0])
        remove(name)

    monkeypatch.setattr(service.store._disk, "remove", watched)
    prompt = Prompt("", chat_ids(CLEARED), "exact", Sampling(max_tokens=4), must_forget=(SECRET,))
    gate = threading.Event()
    service.submit(lambda job: gate.wait(5))
    jobs.append(service.submit(lambda job: service.complete(prompt, job), ""))
    gate.set()
    return jobs[0]


def test_other_work_is_done_between_folders_and_finds_nothing_of_them(make_service, tmp_path, monkeypatch):
    service, talks = many_on_disk(make_service, tmp_path)
    folders, order, others = list((tmp_path / "contexts").iterdir()), [], []
    again = Prompt("", chat_ids(talks[-1]), "exact", Sampling(max_tokens=1))

    def watch(job):
        order.append("folder")
        if len(order) == 1:
            others.append(service.submit(lambda job: order.append("other")))
            others.append(service.submit(lambda job: service.complete(again, job), ""))

    reply = forget_watched(service, monkeypatch, watch).future.result(20)
    assert reply.reuse.forgotten == len(talks) == len(folders)
    assert reply.text == fresh(make_service, CLEARED, max_tokens=4).text
    assert order.index("other") < len(talks)
    assert order.count("folder") == len(talks)
    assert others[1].future.result(20).reuse.tokens_reused < len(again.ids) - 20
    assert not any(folder.exists() for folder in folders)


def test_a_client_that_goes_away_meanwhile_leaves_nothing_to_be_forgotten(make_service, tmp_path, monkeypatch):
    service, _ = many_on_disk(make_service, tmp_path)
    job = forget_watched(service, monkeypatch, lambda job: job.cancel())
    with pytest.raises(JobCancelledError):
        job.future.result(20)
    assert not list((tmp_path / "contexts").iterdir())


def test_what_was_let_go_of_and_not_destroyed_is_so_when_the_server_stops(make_service, tmp_path):
    service, _ = many_on_disk(make_service, tmp_path)
    service.submit(lambda job: service.store.let_go("", lambda row: True)).future.result(5)
    service.close()
    assert not list((tmp_path / "contexts").iterdir())


def test_what_the_disk_refused_to_remove_before_is_destroyed_then(make_service, tmp_path, monkeypatch):
    service = on_disk_only(make_service, tmp_path)

    def refuse(_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(service.store._disk, "remove", refuse)
    assert ask(service, WITH).reuse.tokens_recomputed == 1  # it was read from disk, and is still there
    monkeypatch.undo()
    assert list((tmp_path / "contexts").iterdir())
    ask(service, CLEARED, must_forget=(SECRET,))
    assert not list((tmp_path / "contexts").iterdir())


def test_a_text_in_the_json_of_a_call_is_found(make_service):
    service = make_service()
    talk = [("user", "look"), ("assistant", '{"query": "the \\"code\\" is\\n1234"}'), ("user", "and now?")]
    ask(service, talk)
    assert ask(service, talk[:1], must_forget=('the "code" is\n1234',)).reuse.forgotten == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_both_apis_forget(path):
    def body(talk, **wishes):
        system, rest = messages(talk)[:1], [each for each in messages(talk)[1:] if each["role"] != "tool"]
        head = (
            {"system": system[0]["content"], "messages": rest}
            if path == "/v1/messages"
            else {"messages": system + rest}
        )
        return {**head, "model": NAME, "max_tokens": 4, "temperature": 0, "kveraser": wishes}

    talk = [TALK[0], ("user", SECRET), ("assistant", "so it is"), ("user", "and the car?")]
    clean = [TALK[0], ("user", "[gone]"), *talk[2:]]
    with servers() as make:
        server = make(policy="kveraser")
        assert server.call("POST", path, json=body(talk)).json()["kveraser"]["forgotten"] is None
        refused = server.call("POST", path, json=body(talk, must_forget=[SECRET]))
        assert refused.status_code == 400
        assert "still says it" in refused.json()["error"]["message"]
        assert SECRET not in refused.text
        told = server.call("POST", path, json=body(clean, must_forget=[SECRET])).json()["kveraser"]
        assert (told["forgotten"], told["exact"]) == (1, True)
        assert not any(SECRET in text for held in [said(server.service, held.owner) for held in server.service.store._held.values()] for text in held)  # fmt: skip
