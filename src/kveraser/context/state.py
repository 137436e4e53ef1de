"""What a context consists of: backend, ledger, ids, records of edits; and growing it.

Knows: how these stay in step. Does not know how spans are erased or tokens generated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kveraser.cache import Marks, Tokens, whole_numbers
from kveraser.context.backend import LiveBackend
from kveraser.context.ids import IdBuffer
from kveraser.errors import ContextError, RestoreError
from kveraser.interrupts import uninterrupted
from kveraser.methods import EraseReceipt, Undo
from kveraser.readers import Text
from kveraser.spans import Span, SpanLedger

PURGED = -1
"""What the ledger holds in place of the ids of a purged span."""


@dataclass
class EditRecord:
    """What a context remembers of one edit. The replaced states live in the user's receipt and are only referred to."""

    receipt: EraseReceipt
    dropped: tuple[Span, ...] = ()
    purged: bool = False
    undo: Callable[[], Undo | None] = field(default=lambda: None, repr=False)

    @property
    def erased(self) -> tuple[Span, ...]:
        """Ledger spans that the edit took out of the context (none for `no-erase`)."""
        return self.receipt.spans if self.receipt.tokens_removed else ()

    @property
    def placed(self) -> tuple[Span, ...]:
        """Ledger spans that it put in their place."""
        return self.receipt.replacements if self.receipt.tokens_removed else ()


@dataclass
class Repair:
    """An exact copy in the making, beside the cache that goes on being used."""

    beside: LiveBackend
    start: int
    chunk: int


class ContextState:
    """The parts of a live context, and what every operation on them shares. Guarded by one lock."""

    def __init__(self, backend: LiveBackend, eraser: Any = None) -> None:
        if eraser is not None:
            backend.find_eraser(eraser)
        self.backend = backend
        self.eraser = eraser
        self._lock = threading.RLock()
        self._begin()

    def _begin(self) -> None:
        """Start an empty ledger."""
        self._ledger = SpanLedger()
        self._ids = IdBuffer()
        self._slots = IdBuffer(device=self.device)
        self._records: dict[str, EditRecord] = {}  # replaced, not changed: other threads may be looking
        self._repair: Repair | None = None

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backend.device

    def __len__(self) -> int:
        """Tokens ever appended: the end of the ledger."""
        return self._ledger.length

    @property
    def token_ids(self) -> Tensor:
        """The ids that go with the cache, `(slots,)`; steered slots show the id of a kept neighbor."""
        return self._slots.view.clone()

    @property
    def live_ids(self) -> list[int]:
        """The ids that are in the context: appended and not erased."""
        return [int(token) for run in self._ledger.live() for token in self._ids.view[run.slice].tolist()]

    @property
    def exact(self) -> bool:
        """Whether the whole cache equals a fresh prefill of the live ids."""
        return self.backend.marks.exact

    @property
    def erased(self) -> tuple[Span, ...]:
        """Ledger spans that are erased, or were replaced, or put in and taken back."""
        return tuple(entry.span for entry in self._ledger.erased)

    @property
    def live_spans(self) -> tuple[Span, ...]:
        """Ledger spans that are in the context: the maximal runs between the erased ones, in the order of the cache."""
        return self._ledger.live()

    @property
    def runs(self) -> tuple[tuple[Span, bool], ...]:
        """All ledger spans with whether they are in the context, in the order of the cache: what replaced a span stands before it."""
        return tuple((span, entry is None) for span, entry in self._ledger.runs())

    def standing(self, span: Span) -> tuple[Span, ...]:
        """What stands where a span stood: the span itself, or, where it was replaced, the runs that are live there now."""
        return self._ledger.standing(span)

    @property
    def receipts(self) -> tuple[EraseReceipt, ...]:
        """Receipts of the edits that can be restored, oldest first."""
        return tuple(replace(r.receipt, undo=r.undo()) for r in self._records.values() if not r.purged)

    # -- growing -------------------------------------------------------------------------------------------------

    def append_ids(self, ids: Sequence[int] | Tensor) -> Span:
        """Process tokens at the end of the context; returns their ledger span.

        Raises:
            ContextError: no token, an id outside the vocabulary, or no room.
            OptionError: ids that are no integers.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0:
                raise ContextError("nothing to append: the text has no tokens")
            with self._growing():
                self._extend(new)
                return self._register(new)

    @contextmanager
    def _growing(self) -> Iterator[None]:
        """Let the block put tokens behind the context; if it fails or is interrupted, none of them stays."""
        length, slots = len(self), len(self._slots)
        try:
            yield
        except BaseException:
            with uninterrupted():
                self.backend.crop(slots)
                self._ids.truncate(length)
                self._slots.truncate(slots)
                self._ledger.truncate(length)
            raise

    def _checked_ids(self, ids: Sequence[int] | Tensor) -> Tensor:
        new = whole_numbers(ids).to("cpu", torch.long).reshape(-1)
        vocabulary = self.backend.vocabulary
        if len(new) and not (int(new.min()) >= 0 and int(new.max()) < vocabulary):
            bad = next(int(token) for token in new if not 0 <= int(token) < vocabulary)
            raise ContextError(f"token id {bad} is outside the model's vocabulary of {vocabulary}")
        return new

    @torch.no_grad()
    def _extend(self, new: Tensor) -> None:
        self.backend.check_room(len(new))
        self.backend.extend(self._tokens(new))

    def _tokens(self, new: Tensor) -> Tokens:
        """The tokens of all slots, and new ones behind them."""
        slots = self._slots.view
        return Tokens(torch.cat([slots, new.to(slots.device)])[None])

    def _register(self, new: Tensor) -> Span:
        """Enter tokens whose states are in the cache already."""
        with uninterrupted():
            self._ids.append(new)
            self._slots.append(new.to(self._slots.view.device))
            return self._ledger.append(len(new))

    def _calibration_text(self) -> Text | None:
        """Hook: gives ids of some text to calibrate the model on; None leaves what is in the cache."""
        return None

    # -- records

    def _enter_record(self, record: EditRecord) -> None:
        self._records = {**self._records, record.receipt.id: record}

    def _drop_record(self, record: EditRecord) -> None:
        self._records = {name: known for name, known in self._records.items() if known is not record}

    def _record(self, receipt: EraseReceipt) -> EditRecord:
        if not isinstance(receipt, EraseReceipt):
            raise RestoreError(f"a receipt is needed, as `erase` gave it; got {receipt!r:.60}")
        record = self._records.get(receipt.id)
        if record is None:
            raise RestoreError(
                f"this context knows no {receipt.method} edit of {receipt.span} with that receipt: it was restored "
                "before, or belongs to another context"
            )
        if record.purged:
            raise RestoreError(f"the edit of {receipt.span} was made final by purge; append the text again instead")
        return record

    # -- slots

    def _tokens_of(self, ids: list[int]) -> Tokens:
        return Tokens(torch.tensor([ids], dtype=torch.long, device=self.device))

    def _became_exact(self, ledger: SpanLedger) -> None:
        """Enter that the cache now holds exactly the live tokens; states kept for undoing older edits are freed."""
        slots = self._new_slots(ledger)
        self.backend.marks = Marks()
        self._ledger, self._slots, self._repair = ledger, slots, None
        for record in self._records.values():
            if (undo := record.undo()) is not None:
                undo.clear()
            record.dropped = ()

    def _slot_ids(self, ledger: SpanLedger) -> list[int]:
        """The id of every slot; steered ones take that of the live token before (or behind) them."""
        ids: list[int] = []
        waiting = 0
        for run, entry in ledger.runs():
            if entry is not None:
                held = entry.held[1] - entry.held[0]
                if ids:
                    ids += [ids[-1]] * held
                else:
                    waiting += held
                continue
            tokens = self._ids.view[run.slice].tolist()
            ids += [tokens[0]] * waiting + tokens
            waiting = 0
        return ids

    def _new_slots(self, ledger: SpanLedger) -> IdBuffer:
        """What goes into `_slots` with a ledger."""
        return IdBuffer(self._slot_ids(ledger), self._slots.view.device)
