"""One erase on a server: the requests it takes, and the entries that it needs meanwhile.

Knows: a server with our connector, token ids, slots. Does not know about text or messages.

The server keeps the states of what has been read since the last erase (those of the spans only until it has told who has read
them), computes steering states with the eraser's adapter over a window of kept states, or writes states that nothing attends
to, computes the readers of the spans again with the model itself (or the tokens behind them, over a window), and puts the pieces
together. Random ids ("tombstones") stand for the erased ones from then on.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

from kveraser.cache import Window
from kveraser.engines.vllm.client.http import VLLMClient
from kveraser.engines.vllm.client.passes import Pass, erasing_passes, reader_passes, stretches
from kveraser.engines.vllm.protocol import Demand, Found, Look, Piece, Save, put, reading, take
from kveraser.eraser.config import Choose
from kveraser.errors import EngineError
from kveraser.methods.slots import split_tail
from kveraser.spans import Span, SpanLedger


@dataclass(frozen=True)
class Edit:
    """An edited context on the server: the first `tokens` of a session are served from it, under `salt`."""

    id: str
    tokens: int
    salt: str


@dataclass(frozen=True)
class State:
    """A session's context: ids of the slots (tombstones where steering states are), ledger, edit."""

    ids: tuple[int, ...]
    ledger: SpanLedger
    edit: Edit | None


@dataclass(frozen=True)
class Served:
    """How a server serves the model and its eraser.

    Attributes:
        model, eraser: as the server names them; without an eraser spans are hidden.
        window, repair: what the eraser attends to, and how many tokens are computed again for each span (None: readers by its length).
        choose: which ones: "readers" of the spans in runs on multiples of `block`, until so much of what they have read is
            covered (`coverage`), or the "next" ones behind them.
        vocabulary: number of token ids; `special` ones among them are never tombstones.
    """

    client: VLLMClient
    model: str
    eraser: str | None
    window: Window | None
    repair: int | None
    vocabulary: int
    special: Set[int]
    choose: Choose = "next"
    block: int | None = None
    coverage: float | None = None
    close: bool = False


class Erasing:
    """One erase under way.

    Attributes:
        requests: sent so far.
        recomputed: tokens run through the model or the eraser so far.
        found: who has read the spans, where that was asked.
    """

    def __init__(self, served: Served, before: State) -> None:
        self._served, self._before = served, before
        self._entries: list[str] = []
        self.requests = self.recomputed = 0
        self.found: Found | None = None

    def run(self, spans: tuple[Span, ...]) -> State:
        """Erase ledger spans; returns the state after it."""
        state = self._before
        ledger, length = state.ledger.copy(), len(state.ids)
        slots = tuple(ledger.span_to_cache(span) for span in spans)
        steered = tuple(ledger.span_to_cache(entry.span) for entry in ledger.erased if entry.in_cache)
        rest, end = split_tail(slots, steered, length)
        if end < length:
            ledger.drop_slots([Span(end, length)])
        for span, slot in zip(spans, slots, strict=True):
            ledger.mark(span, in_cache=slot in rest)
        ids = list(state.ids[:end])
        edit = state.edit
        if rest:
            edit = self._steer(ids, rest, tuple(span for span in steered if span.end <= end))
        elif edit and end < edit.tokens:
            left = tuple(span for span in steered if span.end <= end)
            edit = self._compose(ids, (Piece(edit.id, 0, end),), left) if left else None
        return State(tuple(ids), ledger, edit)

    def forget(self, *more: str) -> None:
        """Drop the entries that were needed on the way."""
        gone = (*self._entries, *more)
        self._entries = []
        self._served.client.forget(self._served.model, gone)

    def _steer(self, ids: list[int], spans: tuple[Span, ...], steered: tuple[Span, ...]) -> Edit:
        served = self._served
        readers = served.choose == "readers"
        pieces = self._base(ids, spans, readers)
        if readers:
            self.found = self._look(pieces, spans, steered)
            for span in spans:
                pieces = put(pieces, span.start, Piece(self.found.hidden[1], 0, len(span)))
        if served.eraser:
            repair = 0 if readers else served.repair or 0
            for step in erasing_passes(spans, steered, len(ids), served.window, repair):
                pieces = put(pieces, step.run.start, self._run(step, pieces, ids))
        for span in spans:
            ids[span.slice] = self._tombstones(len(span))
        if self.found is not None:
            pieces = self._run_readers(self.found, pieces, ids, tuple(sorted((*spans, *steered))))
        return self._compose(ids, pieces, (*spans, *steered))

    def _look(self, pieces: tuple[Piece, ...], spans: tuple[Span, ...], steered: tuple[Span, ...]) -> Found:
        """Have the readers of spans told; the states of the spans are then dropped."""
        served = self._served
        look = Look(pieces, spans, steered, served.repair, served.block, served.coverage)
        own = [piece.entry for span in spans for piece in take(pieces, span.start, span.end)]
        gone = tuple(entry for entry in self._entries if entry in own)
        said = self._complete(served.model, [0], Demand(look=look, drop=gone), None)
        self._entries = [entry for entry in self._entries if entry not in gone]
        try:
            found = Found.read(said["found"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError("the server does not tell readers; its log says why") from error
        self._entries += found.hidden
        return found

    def _run_readers(
        self, found: Found, pieces: tuple[Piece, ...], ids: list[int], absent: tuple[Span, ...]
    ) -> tuple[Piece, ...]:
        """Compute the chosen runs again, one after the other, so that each sees what is new in those before it."""
        shown = pieces
        for span in absent:
            shown = put(shown, span.start, Piece(found.hidden[0], 0, len(span)))
        under: dict[tuple[tuple[Span, int], ...], str] = {}
        for step in reader_passes(found.runs, absent, self._served.close):
            gaps = tuple((span, move) for span, move in step.shown if move)
            new = self._run(step, shown, ids, under.setdefault(gaps, secrets.token_hex(16)))
            shown, pieces = (put(each, step.run.start, new) for each in (shown, pieces))
        return pieces

    def _base(self, ids: list[int], spans: tuple[Span, ...], keep: bool) -> tuple[Piece, ...]:
        """Pieces for all slots: those of the edit so far, and newly kept ones; those of the spans themselves only for a look."""
        edit = self._before.edit
        known = min(edit.tokens, len(ids)) if edit else 0
        pieces: tuple[Piece, ...] = (Piece(edit.id, 0, known),) if edit else ()
        saves, at = [], known
        for border in (*spans, Span(len(ids), len(ids) + 1)):
            if border.start > at:
                saves.append(Save(at, border.start))
            at = max(at, border.start)
            if keep and at < border.end <= len(ids):
                saves.append(Save(at, border.end))
            at = max(at, border.end)
        saved: list[Piece] = []
        if saves:
            demand = Demand(edit=edit.id if edit else None, save=tuple(saves))
            done = self._send(self._served.model, ids, demand, edit.salt if edit else None)
            saved = [Piece(entry, 0, len(save)) for entry, save in zip(done, saves, strict=True)]
        at = known
        for piece, save in zip(saved, saves, strict=True):
            pieces += (*_hole(at, save.start), piece)
            at = save.end
        return pieces + _hole(at, len(ids))

    def _run(self, step: Pass, pieces: tuple[Piece, ...], ids: list[int], under: str | None = None) -> Piece:
        """Run one pass; the piece of states it made.

        Args:
            under: an id of passes that show the same states in the same slots, so that each finds what the one before it has.
        """
        load = tuple(
            replace(piece, move=move) for shown, move in step.shown for piece in take(pieces, shown.start, shown.end)
        )
        if any(piece.entry == "" for piece in load):
            raise EngineError("a pass would attend to states that are not kept")
        seen = ids[: step.seen] if under else self._tombstones(step.seen)
        prompt = [*seen, *ids[step.run.slice]]
        demand = Demand(load=load, save=(Save(step.seen, len(prompt), step.kept_move),), under=under)
        entries = self._send((step.eraser and self._served.eraser) or self._served.model, prompt, demand)
        self.recomputed += len(step.run)
        return Piece(entries[0], 0, len(step.run))

    def _compose(self, ids: list[int], pieces: tuple[Piece, ...], absent: tuple[Span, ...]) -> Edit:
        close = (
            self._served.close and self._served.eraser is None
        )  # steering states were trained to be read with their gap open
        served = tuple(
            replace(piece, move=move)
            for stretch, move in stretches(tuple(sorted(absent)), len(ids), close)
            for piece in take(pieces, stretch.start, stretch.end)
        )
        said = self._complete(self._served.model, ids, Demand(compose=served), None)
        with reading("the server"):
            return Edit(**said["edit"])

    def _send(self, model: str, ids: list[int], demand: Demand, salt: str | None = None) -> list[str]:
        said = self._complete(model, ids, demand, salt)
        with reading("the server"):
            entries = list(said.get("saved", ()))
        self._entries += entries
        if len(entries) != len(demand.save):
            raise EngineError("the server did not keep the states it was asked to keep; its log says why")
        return entries

    def _complete(self, model: str, ids: list[int], demand: Demand, salt: str | None) -> dict[str, Any]:
        self.requests += 1
        return self._served.client.complete(model, ids, max_tokens=1, demand=demand, salt=salt).said

    def _tombstones(self, count: int) -> list[int]:
        """Random ids of ordinary tokens."""
        chance = random.SystemRandom()
        found: list[int] = []
        while len(found) < count:
            token = chance.randrange(self._served.vocabulary)
            if token not in self._served.special:
                found.append(token)
        return found


def _hole(start: int, end: int) -> tuple[Piece, ...]:
    """A stand-in for slots whose states are not kept, because they are about to be exchanged."""
    return (Piece("", 0, end - start),) if end > start else ()
