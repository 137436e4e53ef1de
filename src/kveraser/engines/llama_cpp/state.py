"""What a llama.cpp context consists of: cells, ledger, ids, marks, records of edits; and growing it.

Knows: how these stay in step. Does not know how spans are erased or tokens sampled.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kveraser.cache import Marks
from kveraser.context.ids import IdBuffer
from kveraser.engines.llama_cpp.cells import LIVE, Cells
from kveraser.engines.llama_cpp.kept import KeptCells
from kveraser.engines.llama_cpp.model import LlamaCppModel
from kveraser.engines.llama_cpp.passes import Bench
from kveraser.errors import ContextError, OptionError, RestoreError
from kveraser.export import GgufEraser
from kveraser.interrupts import uninterrupted
from kveraser.methods import EraseReceipt
from kveraser.spans import Span, SpanLedger

LENGTH = 8192
"""Default room of a context, in tokens; less where the model was trained on less."""


@dataclass(frozen=True)
class LlamaCppReceipt(EraseReceipt):
    """What an erase did; `kept` holds the replaced cells as long as the receipt lives."""

    kept: KeptCells | None = field(default=None, repr=False, compare=False)


@dataclass
class EditRecord:
    """What a context remembers of one edit."""

    receipt: LlamaCppReceipt
    """Without its kept cells."""
    dropped: tuple[Span, ...]
    """Older erased spans that lost their slots by it."""

    @property
    def erased(self) -> tuple[Span, ...]:
        """Ledger spans that the edit took out of the context (none for `no-erase`)."""
        return self.receipt.spans if self.receipt.tokens_removed else ()


class LlamaCppState:
    """The parts of a live context. Guarded by one lock.

    Args:
        model: a loaded GGUF file.
        eraser: GGUF adapter for `kveraser`; None takes the one that ships for the model, when it is first needed.
        length: tokens the context can hold; None for 8192, or what the model was trained on where that is less.
        keys, values: types of the cache: f32, f16, q8_0, q5_1, q5_0, q4_1, q4_0.
        flash_attention: None leaves it to llama.cpp.

    Raises:
        OptionError: an impossible length or type.
        EraserMismatchError: an eraser of another model.
        EngineError: llama.cpp cannot make the context.
    """

    def __init__(
        self,
        model: LlamaCppModel,
        eraser: GgufEraser | None = None,
        *,
        length: int | None = None,
        keys: str = "f16",
        values: str = "f16",
        flash_attention: bool | None = None,
    ) -> None:
        if length is not None and length > model.trained_length > 0:
            raise OptionError(f"a context of {length} tokens: {model.file.name} was trained on {model.trained_length}")
        self.model = model
        self.eraser = eraser
        self._adapter: Any = model.load_adapter(eraser) if eraser else None
        room = min(LENGTH, model.trained_length or LENGTH) if length is None else length
        self._cells = Cells(model, room, keys, values, flash_attention)
        self._bench: Bench | None = None
        self._ledger = SpanLedger()
        self._ids = IdBuffer()
        self._marks = Marks()
        self._records: dict[str, EditRecord] = {}
        self._lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Where the logits that are returned are."""
        return torch.device("cpu")

    def __len__(self) -> int:
        """Tokens ever appended: the end of the ledger."""
        return self._ledger.length

    @property
    def live_ids(self) -> list[int]:
        """The ids that are in the context: appended and not erased."""
        return self._live_ids(self._ledger)

    @property
    def exact(self) -> bool:
        """Whether every cell is as a fresh prefill of the live ids would leave it."""
        return self._marks.exact

    @property
    def erased(self) -> tuple[Span, ...]:
        """Ledger spans that are erased."""
        return tuple(entry.span for entry in self._ledger.erased)

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self._cells.length - self._slots

    @property
    def _slots(self) -> int:
        """Number of cells: live tokens and steering states."""
        return self._ledger.cache_length

    def _live_ids(self, ledger: SpanLedger) -> list[int]:
        return [int(token) for run in ledger.live() for token in self._ids.view[run.slice].tolist()]

    def _ids_of_slots(self, span: Span, ledger: SpanLedger | None = None) -> list[int]:
        """The ids of slots that hold live tokens."""
        ledger = ledger or self._ledger
        ids: list[int] = []
        for run in ledger.live():
            start = ledger.to_cache(run.start)
            a, b = max(span.start, start), min(span.end, start + len(run))
            if a < b:
                ids += self._ids.view[run.start + a - start : run.start + b - start].tolist()
        if len(ids) != len(span):
            raise RestoreError(f"slots {span} hold erased tokens, whose ids are not to be run again")
        return ids

    def close(self) -> None:
        """Free the cells now, not when the object is collected; it cannot be used afterwards."""
        self._cells.close()
        if self._bench is not None:
            self._bench.cells.close()

    # -- growing -------------------------------------------------------------------------------------------------

    def append_ids(self, ids: Sequence[int] | Tensor) -> Span:
        """Process tokens at the end of the context; returns their ledger span.

        Raises:
            ContextError: no token, an id outside the vocabulary, or no room. Nothing was changed.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if not new:
                raise ContextError("nothing to append: the text has no tokens")
            self._check_room(len(new))
            start = self._slots
            try:
                self._cells.run(new, start, LIVE)
            except BaseException:
                with uninterrupted():
                    self._cells.remove(LIVE, Span(start, start + len(new)))
                raise
            return self._register(new)

    def _checked_ids(self, ids: Sequence[int] | Tensor) -> list[int]:
        new = [int(token) for token in (ids.reshape(-1).tolist() if isinstance(ids, Tensor) else ids)]
        bad = next((token for token in new if not 0 <= token < self.model.vocabulary), None)
        if bad is not None:
            raise ContextError(f"token id {bad} is outside the model's vocabulary of {self.model.vocabulary}")
        return new

    def _check_room(self, count: int) -> None:
        if count > self.room:
            raise ContextError(
                f"{count} more tokens do not fit: {self._slots} of {self._cells.length} cells are in use; make the context "
                "with a larger length"
            )

    def _register(self, new: Sequence[int]) -> Span:
        """Enter tokens whose cells are there already."""
        with uninterrupted():
            self._ids.append(torch.tensor(list(new), dtype=torch.long))
            return self._ledger.append(len(new))

    def _record(self, receipt: EraseReceipt) -> EditRecord:
        record = self._records.get(receipt.id)
        if record is None:
            raise RestoreError(
                f"this context knows no {receipt.method} edit of {receipt.span} with that receipt: it was restored "
                "before, or belongs to another context"
            )
        return record
