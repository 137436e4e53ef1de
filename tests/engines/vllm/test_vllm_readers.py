"""Readers told from a server's stored states, and computed again in runs: as transformers does it with the same probes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vllm_session import WORDS, same_answer, same_states, states_of
from vllm_stand_in import StandIn

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.context.text import any_text
from kveraser.engines.vllm.client import session as vllm_session
from kveraser.engines.vllm.client.passes import reader_passes
from kveraser.engines.vllm.client.session import VLLMSession
from kveraser.engines.vllm.client.together import erase_together
from kveraser.engines.vllm.protocol import KEY, Demand, Look, Piece, read_demand
from kveraser.engines.vllm.server.looking import Looking
from kveraser.errors import EngineError
from kveraser.readers import calibrate
from kveraser.spans import Span

TOKENS = make_tokenizer().encode(WORDS * 40, add_special_tokens=False)


@pytest.fixture(scope="module")
def calibration():
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, len(make_tokenizer()), (400,), generator=generator)
    return calibrate(text_model(), ids)


@pytest.fixture
def connect(tmp_path_factory, monkeypatch, calibration):
    """Make a session on a stand-in server that can tell readers, and a transformers context that erases alike."""

    def connected(kind="neutral", window=(2, 16), repair=32, **options):
        trained = random_eraser(text_model(), window=window, repair=4, choose="next")
        trained.calibration = calibration
        server = StandIn(tmp_path_factory.mktemp("store"), trained, window and list(window), 4)
        monkeypatch.setattr(vllm_session, "VLLMClient", lambda *args, **options: server)
        session = VLLMSession(
            "http://stand-in", tokenizer=make_tokenizer(), eraser=kind, choose="readers", repair=repair, **options
        )
        eraser = trained
        if kind == "neutral":
            eraser = kv.KVEraser.neutral(text_model())
            eraser.calibration = calibration
        block = min(options.get("block", 16), 70 if repair is None else repair) or None
        method = kv.Steering(eraser, repair=repair, choose="readers", block=block, keys=None)
        return server, session, kv.ErasableContext(text_model(), make_tokenizer(), eraser), method

    return connected


@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=5),
    repair=st.sampled_from([0, 5, 32, None]),
    data=st.data(),
)
def test_readers_are_those_of_transformers_and_end_with_its_states(connect, lengths, repair, data):
    server, session, context, method = connect(repair=repair)
    spans, at = [], 0
    for length in lengths:
        ids, at = TOKENS[at : at + length], at + length
        assert session.append(ids) == context.append(ids)
        spans.append(Span(at - length, at))
    for _ in range(2):
        live = [
            span for span in spans[:-1] if not any(span.overlaps(entry.span) for entry in session._state.ledger.erased)
        ]
        if not live:
            break
        what = data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=2, unique=True))
        mine, theirs = session.erase(what), context.erase(what, method)
        assert mine.recomputed == theirs.recomputed
        assert mine.tokens_recomputed == theirs.tokens_recomputed
        assert mine.residual == pytest.approx(theirs.residual, abs=1e-3)
        assert (mine.eraser, mine.exact) == ("neutral", False)
        same_states(server, session, context)
        same_answer(session, context, tokens=4)
        more, at = TOKENS[at : at + 9], at + 9
        assert session.append(more) == context.append(more)
    assert set(server.store.ids()) == {edit.id for edit in (session._state.edit, session._last._before.edit) if edit}


def test_a_trained_eraser_steers_the_span_and_the_readers_never_see_that(connect):
    server, session, context, method = connect("eraser", window=None)
    for ctx in (session, context):
        ctx.append(TOKENS[:60])
        span = ctx.append(TOKENS[60:75])
        ctx.append(TOKENS[75:240])
    mine, theirs = session.erase(span), context.erase(span, method)
    assert (mine.recomputed, mine.eraser) == (theirs.recomputed, "trained")
    same_states(server, session, context)
    same_answer(session, context)


def some_context(session):
    session.append(TOKENS[:60])
    span = session.append(TOKENS[60:75])
    session.append(TOKENS[75:240])
    return span


def test_nothing_of_a_span_is_on_the_server_once_its_readers_are_told(connect):
    server, session, *_ = connect()
    span = some_context(session)
    ids = list(session._state.ids[span.slice])
    seen, look = [], server.looking.look

    def looked(asked, client=None):
        seen.append({piece.entry for piece in asked.pieces})
        return look(asked, client)

    server.looking.look = looked
    server.prompts.clear()
    session.erase(span, undo=False)
    assert server.prompts[0][span.slice] == ids  # the one that reads the context
    assert all(prompt[span.slice] != ids for prompt in server.prompts[1:])
    assert server.store.ids() == [session._state.edit.id]
    assert seen[0].isdisjoint(server.store.ids())


def test_a_look_that_fails_leaves_session_and_store_as_they_were(connect, monkeypatch):
    server, session, *_ = connect()
    span = some_context(session)
    before = session._state

    def fail(*_):
        raise EngineError("no room")

    monkeypatch.setattr(server.looking, "look", fail)
    with pytest.raises(EngineError, match="no room"):
        session.erase(span)
    assert session._state is before
    assert server.store.ids() == []


def test_runs_that_see_the_same_share_blocks_and_others_do_not(connect):
    server, session, *_ = connect()
    session.append(TOKENS[:20])
    first = session.append(TOKENS[20:35])
    session.append(TOKENS[35:60])
    second = session.append(TOKENS[60:75])
    session.append(TOKENS[75:240])
    asked, call = [], server.call

    def called(path, body=None):
        if body and (demand := read_demand(body.get("kv_transfer_params"))) and demand.under:
            asked.append((demand, body["prompt"]))
        return call(path, body)

    runs = (Span(35, 40), Span(50, 55), Span(80, 90), Span(120, 130))
    look = server.looking.look
    server.looking.look = lambda *asked: replace(look(*asked), runs=runs)
    server.call = called
    assert session.erase([first, second]).recomputed == runs
    moves = [tuple((len(piece), piece.move) for piece in demand.load if piece.move) for demand, _ in asked]
    assert len({(demand.under, move) for (demand, _), move in zip(asked, moves, strict=True)}) == len(set(moves)) == 2
    for (one, ids), (other, more) in pairwise(asked):
        assert more[: len(ids)] == ids
        assert all(
            a == b for a, b in zip(one.load, other.load, strict=False) if one.under == other.under
        )  # what is new comes behind


@given(st.data())
@settings(max_examples=20)
def test_a_run_is_shown_every_slot_before_it_and_what_is_before_a_gap_as_far_away_as_without_it(data):
    borders = data.draw(st.lists(st.integers(1, 60), min_size=4, max_size=8, unique=True).map(sorted))
    spans = [Span(a, b) for a, b in pairwise(borders)]
    absent, runs = tuple(spans[0:-1:2]), tuple(span for span in spans[1::2] if span.start >= spans[0].end)
    close = data.draw(st.booleans())
    for step in reader_passes(runs, absent, close):
        at = 0
        for shown, move in step.shown:
            assert shown.start == at
            at = shown.end
            behind = sum(len(span) for span in absent if shown.end <= span.start < step.run.start)
            assert move == (behind if close and shown not in absent else 0)
        assert (at, step.kept_move, step.seen) == (step.run.start, 0, step.run.start)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choose": "next"}, "no choice with the neutral"),
        ({"choose": "others"}, "none of readers, next"),
        ({"repair": -1}, "at least 0"),
        ({"coverage": 2.0}, "coverage"),
        ({"block": 0}, "block"),
    ],
)
def test_impossible_choices_are_refused(connect, options, words):
    connect()
    with pytest.raises(kv.OptionError, match=words):
        VLLMSession("http://stand-in", tokenizer=make_tokenizer(), eraser="neutral", **options)


def test_by_itself_a_session_takes_the_eraser_that_is_better_and_readers_where_they_can_be_told(connect):
    server, *_ = connect()
    for about, expected in (
        ({"preferred": False}, ("neutral", "readers", None)),
        ({"preferred": True, "choose": "readers", "readers": 48}, ("eraser", "readers", 48)),
        ({"preferred": True, "choose": "next"}, ("eraser", "next", 4)),
    ):
        server.about |= about
        session = VLLMSession("http://stand-in", tokenizer=make_tokenizer())
        assert (session.eraser, session.choose, session.repair) == expected


def test_a_server_of_before_erases_with_its_adapter_and_the_next_tokens(connect):
    server, *_ = connect()
    for name in ("choose", "readers", "preferred"):
        del server.about[name]
    session = VLLMSession("http://stand-in", tokenizer=make_tokenizer())
    assert (session.eraser, session.choose, session.repair) == ("eraser", "next", 4)
    receipt = session.erase(some_context(session))
    assert (receipt.residual, receipt.recomputed, receipt.tokens_recomputed) == (None, (), 19)
    with pytest.raises(kv.OptionError, match="no probes"):
        VLLMSession("http://stand-in", tokenizer=make_tokenizer(), choose="readers")
    with pytest.raises(EngineError, match=r"readers\.safetensors"):
        VLLMSession("http://stand-in", tokenizer=make_tokenizer(), eraser="neutral")


def test_with_gaps_left_open_no_key_is_moved(connect):
    server, session, *_ = connect(close_gaps=False)
    span = some_context(session)
    asked, call = [], server.call

    def called(path, body=None):
        asked.append(read_demand((body or {}).get("kv_transfer_params")))
        return call(path, body)

    server.call = called
    session.erase(span)
    pieces = [piece for demand in asked for piece in (*demand.load, *demand.compose)]
    assert pieces
    assert not any(piece.move for piece in pieces)
    assert session.close_gaps is False
    assert server.store.entry(session._state.edit.id).pieces == (Piece(session._state.edit.id, 0, 240),)


@pytest.mark.parametrize("closes", [True, False])
def test_a_session_closes_gaps_where_its_server_says_that_it_costs_little(connect, closes):
    server, *_ = connect()
    server.about["close_gaps"] = closes
    session = VLLMSession("http://stand-in", tokenizer=make_tokenizer(), eraser="neutral")
    assert session.close_gaps is closes
    assert VLLMSession("http://stand-in", tokenizer=make_tokenizer(), eraser="neutral", close_gaps=True).close_gaps


def test_sessions_that_erase_together_end_as_they_do_one_by_one_and_one_that_fails_leaves_the_others_alone(connect):
    server, first, *_ = connect()
    options = {"tokenizer": make_tokenizer(), "eraser": "neutral", "repair": 32}
    sessions = [first, *(VLLMSession("http://stand-in", **options) for _ in range(3))]
    spans: list = [some_context(session) for session in sessions]
    spans[2] = "not there"
    wanted = sessions[3].erase(spans[3])
    done = erase_together(list(zip(sessions[:3], spans[:3], strict=True)))
    for session, receipt in zip(sessions[:2], done[:2], strict=True):
        assert (receipt.recomputed, receipt.residual) == (wanted.recomputed, wanted.residual)
        assert receipt.edit == session._state.edit != sessions[3]._state.edit
        for mine, theirs in zip(states_of(server, session), states_of(server, sessions[3]), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
    assert isinstance(done[2], kv.SpanError)
    assert sessions[2]._state.edit is None
    with pytest.raises(kv.OptionError, match="twice"):
        erase_together([(first, spans[0]), (first, spans[1])])
    assert erase_together([]) == []


def test_a_server_without_probes_calibrates_once_on_its_own_states(tmp_path, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path / "cache"))
    eraser = random_eraser(text_model(), window=(2, 16), repair=4)
    server = StandIn(tmp_path / "store", eraser, [2, 16], 4, learns=True)
    server.about["max_tokens"] = 1100
    monkeypatch.setattr(vllm_session, "VLLMClient", lambda *args, **options: server)
    session = VLLMSession("http://stand-in", tokenizer=make_tokenizer(), eraser="neutral")
    made = server.looking.calibration
    text = torch.tensor(make_tokenizer().encode(any_text(), add_special_tokens=False)[:1099])
    wanted = calibrate(text_model(), text)
    assert made.explained == pytest.approx(wanted.explained, abs=0.02)
    assert [probe.layer for probe in made.probes] == [probe.layer for probe in wanted.probes]
    assert torch.allclose(made.neutral, wanted.neutral, rtol=0.05, atol=0.05)
    assert len(list((tmp_path / "cache" / "readers").iterdir())) == 1
    assert server.store.ids() == []
    assert session.erase(some_context(session)).residual is not None
    asked = len(server.prompts)
    again = Looking(server.store, tmp_path, eraser.config, 4)  # of the next process
    assert again.knows
    VLLMSession("http://stand-in", tokenizer=make_tokenizer())
    assert len(server.prompts) == asked + 1


def test_a_server_that_cannot_calibrate_goes_on_with_its_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path / "cache"))
    server = StandIn(tmp_path / "store", random_eraser(text_model(), window=(2, 16), repair=4), [2, 16], 4, learns=True)
    monkeypatch.setattr(vllm_session, "VLLMClient", lambda *args, **options: server)
    monkeypatch.setattr(server.looking, "learn", Mock(side_effect=EngineError("no")))
    for tokens in (600, 100):  # too few to calibrate on
        server.about["max_tokens"] = tokens
        session = VLLMSession("http://stand-in", tokenizer=make_tokenizer())
        assert (session.eraser, session.choose) == ("eraser", "next")
        assert server.store.ids() == []


LOOK = Look((Piece("0" * 32, 0, 100),), (Span(10, 20),), (Span(30, 40),), 32, 16, 0.9)


def test_a_look_is_what_was_said():
    assert read_demand(Demand(look=LOOK, drop=("1" * 32,)).params()).look == LOOK


@pytest.mark.parametrize(
    "changes",
    [
        {"spans": []},
        {"spans": [[5, 5]]},
        {"spans": [[90, 100]]},
        {"spans": [[10, 200]]},
        {"absent": [[15, 25]]},
        {"pieces": [["../x", 0, 100]]},
        {"pieces": [["0" * 32, 0, 100, 3]]},
        {"repair": -1},
        {"repair": "all"},
        {"block": 0},
        {"coverage": 0},
        {"path": "/etc"},
    ],
)
def test_a_look_that_cannot_be_is_refused(changes):
    said = Demand(look=LOOK).params()
    said[KEY]["look"] |= changes
    with pytest.raises(EngineError):
        read_demand(said)


def test_a_look_that_does_not_say_how_many_tokens_is_refused():
    said = Demand(look=LOOK).params()
    del said[KEY]["look"]["repair"]
    with pytest.raises(EngineError, match="repair"):
        read_demand(said)


@pytest.mark.parametrize("demand", [Demand(look=LOOK, edit="0" * 32), Demand(under="0" * 32)])
def test_what_does_not_go_together_is_refused(demand):
    with pytest.raises(EngineError):
        read_demand(demand.params())
