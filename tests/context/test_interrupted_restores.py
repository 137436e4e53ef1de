"""Ctrl-C during a restore, wherever it comes: cache, ledger, ids and marks are as they were, or as they are afterwards."""

from __future__ import annotations

import signal
import sys

import pytest

import kveraser as kv
from conftest import same, tiny, token_ids
from kinds import EVERY_KIND
from kveraser.readers import calibrate, remember

WATCHED = ("context/restoring.py", "context/state.py", "methods/undo.py", "methods/putting_back.py")


@pytest.fixture(autouse=True, scope="module")
def _calibrated():
    remember(tiny(), calibrate(tiny(), token_ids(500, seed=8)[0]))


@pytest.fixture(autouse=True)
def _python_handles_ctrl_c():
    """Also where the tests themselves run in the background, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def newest_that_moved(kind, context):
    return context.erase_spans(kv.Span(5, 8), "delete-and-shift")


def newest_behind_which_text_was_appended(kind, context):
    receipt = context.erase_spans(kv.Span(5, 8), kind.steering(3))
    context.append_ids([4, 5])
    return receipt


def older_that_stayed_in_place(kind, context):
    receipt = context.erase_spans(kv.Span(15, 18), kind.steering(3))
    context.erase_spans(kv.Span(5, 8), kind.steering(3))
    return receipt


def older_that_has_to_be_recomputed(kind, context):
    receipt = context.erase_spans(kv.Span(5, 8), "delete-and-shift")
    context.erase_spans(kv.Span(12, 14), "delete-and-shift")
    return receipt


def of_a_replacement(kind, context):
    return context.replace_spans(kv.Span(5, 8), [9, 8, 7, 6], "full-recompute")


EDITS = [
    newest_that_moved, newest_behind_which_text_was_appended, older_that_stayed_in_place, older_that_has_to_be_recomputed,
    of_a_replacement,
]  # fmt: skip


def interrupted(work, line):
    """Run some work and press Ctrl-C at so many lines of it; whether it came to that line."""
    passed, before = 0, sys.gettrace()

    def lines(frame, event, _):
        nonlocal passed
        passed += event == "line"
        if event == "line" and passed == line:
            signal.raise_signal(signal.SIGINT)
        return lines

    sys.settrace(lambda frame, *_: lines if frame.f_code.co_filename.endswith(WATCHED) else None)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return passed >= line


def everything(kind, context):
    """All that must change together."""
    marks = context.backend.marks
    return (
        context.live_ids, context.token_ids.tolist(), context.backend.length, context.erased, context.live_spans,
        marks.approximate_from, marks.steered_spans, [(edit.length_after, edit.written) for edit in marks.edits],
        [known.spans for known in context.receipts],
    ), kind.states(context)  # fmt: skip


def equal(one, other):
    return one[0] == other[0] and same(one[1], other[1])


@pytest.mark.long
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("edit", EDITS)
def test_a_restore_that_is_interrupted_anywhere_is_done_or_has_changed_nothing(edit, kind):
    line, reached, found, done = 0, True, set(), None
    while reached:
        line += 1
        context = kind.context(window=(2, 8))
        context.append_ids(token_ids(30)[0])
        receipt = edit(kind, context)
        before = everything(kind, context)
        reached = interrupted(lambda context=context, receipt=receipt: context.restore(receipt), line)
        after = everything(kind, context)
        undone = receipt.id not in {known.id for known in context.receipts}
        found.add(undone)
        if not undone:
            assert equal(after, before), f"line {line}"
            context.restore(receipt)
            after = everything(kind, context)
        assert len(context.token_ids) == context.backend.length
        done = done or after
        assert equal(after, done), f"line {line}"
    assert found == {False, True}
