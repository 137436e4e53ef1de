"""A live context of token ids: a cache, the ledger of what was appended, and what was erased from it.

Knows: models, caches, ledger spans, erasing methods. Does not know about text, chat or files (`text` adds those).

Every token that is appended keeps its ledger position for ever. Where its states are in the cache is looked up when
needed, so a method that moves the suffix does not make older spans stale.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kveraser.cache import (
    PREFILL_CHUNK,
    GrowableLayer,
    Marks,
    Tokens,
    append,
    cache_length,
    check_model,
    extend,
    get_marks,
    growable_cache,
    set_marks,
    snapshot,
    truncate,
)
from kveraser.edit import run_edit
from kveraser.eraser import KVEraser
from kveraser.errors import ContextError, RestoreError
from kveraser.ids import IdBuffer
from kveraser.interrupts import uninterrupted
from kveraser.methods import EraseMethod, EraseReceipt, as_method, put_back
from kveraser.methods.base import Plan, Undo
from kveraser.model_view import causal_lm, evaluating, model_device
from kveraser.spans import Span, SpanLedger, merge_spans

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


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did.

    Attributes:
        bit_exact: whether every state is the very one from before the erase.
        exact: whether the whole cache now equals a fresh prefill of what is in the context.
        tokens_recomputed: tokens that were run again (those appended since, or everything behind the span).
        seconds: wall-clock time.
    """

    bit_exact: bool
    exact: bool
    tokens_recomputed: int
    seconds: float


@dataclass(frozen=True)
class RepairProgress:
    """How far a repair is, in tokens."""

    done: int
    total: int

    @property
    def finished(self) -> bool:
        """Whether the context is exact now."""
        return self.done >= self.total


@dataclass
class _Repair:
    """An exact copy in the making, beside the cache that goes on being used."""

    cache: DynamicCache
    start: int
    chunk: int


class TokenContext:
    """A context of token ids whose spans can be erased, restored, repaired and purged. One row; thread-safe.

    Args:
        model: a causal language model, used and left as it is.
        eraser: for `kveraser` and `auto`; None takes the one that ships for the model, if any.

    Raises:
        UnsupportedCacheError: a model whose cache cannot be edited.
        EraserMismatchError: an eraser of another model.
    """

    def __init__(self, model: PreTrainedModel, eraser: KVEraser | None = None) -> None:
        check_model(model)
        if eraser is not None:
            eraser.check_model(model)
        self.model = model
        self.eraser = eraser
        self.cache = growable_cache()
        self._ledger = SpanLedger()
        self._ids = IdBuffer()
        self._slots = IdBuffer(device=model_device(model))
        self._records: dict[str, EditRecord] = {}
        self._repair: _Repair | None = None
        self._lock = threading.RLock()

    # -- reading -------------------------------------------------------------------------------------------------

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
        return get_marks(self.cache).exact

    @property
    def erased(self) -> tuple[Span, ...]:
        """Ledger spans that are erased."""
        return tuple(entry.span for entry in self._ledger.erased)

    @property
    def receipts(self) -> tuple[EraseReceipt, ...]:
        """Receipts of the edits that can be restored, oldest first."""
        return tuple(replace(r.receipt, undo=r.undo()) for r in self._records.values() if not r.purged)

    # -- growing -------------------------------------------------------------------------------------------------

    def append_ids(self, ids: Sequence[int] | Tensor) -> Span:
        """Process tokens at the end of the context; returns their ledger span.

        Raises:
            ContextError: no token, or an id outside the vocabulary.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0:
                raise ContextError("nothing to append: the text has no tokens")
            self._extend(new)
            return self._register(new)

    def _checked_ids(self, ids: Sequence[int] | Tensor) -> Tensor:
        new = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
        vocabulary = causal_lm(self.model).get_input_embeddings().num_embeddings
        if len(new) and not (int(new.min()) >= 0 and int(new.max()) < vocabulary):
            bad = next(int(token) for token in new if not 0 <= int(token) < vocabulary)
            raise ContextError(f"token id {bad} is outside the model's vocabulary of {vocabulary}")
        return new

    @torch.no_grad()
    def _extend(self, new: Tensor) -> None:
        slots = self._slots.view
        extend(self.model, self.cache, Tokens(torch.cat([slots, new.to(slots.device)])[None]))

    def _register(self, new: Tensor) -> Span:
        """Enter tokens whose states are in the cache already."""
        with uninterrupted():
            self._ids.append(new)
            self._slots.append(new.to(self._slots.view.device))
            return self._ledger.append(len(new))

    # -- erasing -------------------------------------------------------------------------------------------------

    def erase_spans(
        self, spans: Span | Iterable[Span], method: str | EraseMethod | KVEraser = "kveraser", *, undo: bool = True
    ) -> EraseReceipt:
        """Erase ledger spans; see `ErasableContext.erase`."""
        with self._lock:
            chosen = as_method(method)
            wanted = merge_spans([spans] if isinstance(spans, Span) else spans, self._ledger.length)
            for span in wanted:
                self._ledger.check_live(span)
            slots = merge_spans((self._ledger.span_to_cache(span) for span in wanted), cache_length(self.cache))
            final: list[EraseReceipt] = []

            def commit(receipt: EraseReceipt) -> None:
                entered = replace(receipt, spans=wanted)
                self._commit(entered, chosen.removes)
                final.append(entered)

            run_edit(self.model, self.cache, Tokens(self._slots.view[None]), slots, chosen, self.eraser, undo, commit)
            return final[0]

    def _commit(self, receipt: EraseReceipt, removes: bool) -> None:
        dropped: tuple[Span, ...] = ()
        if removes:
            slot_of = {span: self._ledger.to_cache(span.start) for span in receipt.spans}
            dropped = self._ledger.drop_slots(receipt.removed)
            for span, slot in slot_of.items():
                self._ledger.mark(span, in_cache=any(slot in steered for steered in receipt.steered))
            self._follow(receipt)
            self._repair = None
        record = EditRecord(replace(receipt, undo=None), dropped)
        if receipt.undo is not None:
            record.undo = weakref.ref(receipt.undo)
        self._records[receipt.id] = record

    def _follow(self, receipt: EraseReceipt) -> None:
        """Keep the slot ids in step with the cache."""
        if receipt.removed:
            self._slots = IdBuffer(receipt.token_ids(self._slots.view), self._slots.view.device)
        else:
            for span in receipt.steered:
                self._slots.view[span.slice] = self._slots.view[receipt.stand_in(span)]

    # -- undoing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, receipt: EraseReceipt) -> RestoreReport:
        """Undo an erase.

        Bit-exact while nothing was appended since, for the newest edit and for steering edits in any order. Otherwise
        what is needed is recomputed: the tokens appended since, or everything behind the span; the report says so.

        Raises:
            RestoreError: a receipt of another context, restored before, or made final by `purge`. Nothing is changed.
        """
        with self._lock:
            started = time.perf_counter()
            record = self._record(receipt)
            marks, length = get_marks(self.cache), cache_length(self.cache)
            try:
                after = next(edit.length_after for edit in marks.edits if edit.id == receipt.id)
                undo = record.undo()
                if undo is None:
                    raise RestoreError("its states were freed")
                tail = self._slots.view[after:].clone()
                in_place = Plan(undo.layout_from, tuple(span for span, _ in undo.regions))
                saved = Undo.take(self.cache, in_place, marks)
                put_back(self.cache, replace(receipt, undo=undo))
            except (RestoreError, StopIteration):
                recomputed = self._restore_by_recomputing(record)
                return RestoreReport(False, self.exact, recomputed, time.perf_counter() - started)
            try:
                if len(tail):
                    truncate(self.cache, undo.length)
                    self._extend_cache([*self._ids_of_slots_before(record), *tail.tolist()])
            except BaseException:
                with uninterrupted():
                    saved.put_back(self.cache)
                raise
            with uninterrupted():
                self._unmark(record)
                self._rebuild_slots()
            assert length >= after
            return RestoreReport(not len(tail), self.exact, len(tail), time.perf_counter() - started)

    def _record(self, receipt: EraseReceipt) -> EditRecord:
        record = self._records.get(receipt.id)
        if record is None:
            raise RestoreError(
                f"this context knows no {receipt.method} edit of {receipt.span} with that receipt: it was restored "
                "before, or belongs to another context"
            )
        if record.purged:
            raise RestoreError(f"the edit of {receipt.span} was made final by purge; append the text again instead")
        return record

    def _unmark(self, record: EditRecord) -> None:
        for span in record.erased:
            self._ledger.unmark(span)
        self._ledger.set_in_cache(record.dropped, True)
        self._records.pop(record.receipt.id)
        self._repair = None

    def _ledger_without(self, record: EditRecord) -> SpanLedger:
        ledger = self._ledger.copy()
        for span in record.erased:
            ledger.unmark(span)
        ledger.set_in_cache(record.dropped, True)
        return ledger

    def _ids_of_slots_before(self, record: EditRecord) -> list[int]:
        """Ids of the slots that the cache had when the edit was made."""
        undo = record.undo()
        assert undo is not None
        return self._slot_ids(self._ledger_without(record))[: undo.length]

    def _extend_cache(self, ids: list[int]) -> None:
        device = model_device(self.model)
        extend(self.model, self.cache, Tokens(torch.tensor([ids], device=device)))

    def _restore_by_recomputing(self, record: EditRecord) -> int:
        """Bring a span back from its ids: everything from it on is recomputed exactly; returns the number of tokens."""
        ledger = self._ledger_without(record)
        slot = ledger.to_cache(record.receipt.spans[0].start)
        marks = get_marks(self.cache)
        start = min(slot, cache_length(self.cache) if marks.exact else marks.approximate_from or 0)
        ledger.set_in_cache([entry.span for entry in ledger.erased], False)
        ids = self._slot_ids(ledger)
        saved = Undo.take(self.cache, Plan(start), marks)
        try:
            truncate(self.cache, start)
            self._extend_cache(ids)
        except BaseException:
            with uninterrupted():
                saved.put_back(self.cache)
            raise
        with uninterrupted():
            self._records.pop(record.receipt.id)
            self._became_exact(ledger)
        return len(ids) - start

    def _became_exact(self, ledger: SpanLedger) -> None:
        """Enter that the cache now holds exactly the live tokens; states kept for undoing older edits are freed."""
        set_marks(self.cache, Marks())
        self._ledger = ledger
        self._repair = None
        for record in self._records.values():
            if (undo := record.undo()) is not None:
                undo.clear()
            record.dropped = ()
        self._rebuild_slots()

    def _slot_ids(self, ledger: SpanLedger) -> list[int]:
        """The id of every slot; steered ones take that of the live token before (or behind) them."""
        ids: list[int] = []
        waiting = 0
        runs = sorted(
            [*((run, True) for run in ledger.live()), *((e.span, False) for e in ledger.erased if e.in_cache)]
        )
        for run, live in runs:
            if not live:
                waiting, ids = (waiting, ids + [ids[-1]] * len(run)) if ids else (waiting + len(run), ids)
                continue
            tokens = self._ids.view[run.slice].tolist()
            ids += [tokens[0]] * waiting + tokens
            waiting = 0
        return ids

    def _rebuild_slots(self) -> None:
        self._slots = IdBuffer(self._slot_ids(self._ledger), self._slots.view.device)

    # -- becoming exact ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def repair(
        self,
        *,
        chunk: int = PREFILL_CHUNK,
        max_chunks: int | None = None,
        progress: Callable[[RepairProgress], None] | None = None,
    ) -> RepairProgress:
        """Recompute exactly what approximate erases left, beside the cache, and swap when done.

        The context can be used between calls with `max_chunks`; appended tokens are taken along, another erase or
        restore starts the repair over. Ends bit-equal to `full-recompute` with the same chunks.

        Args:
            chunk: tokens per forward.
            max_chunks: forwards to run now; None runs to the end.
            progress: called after every chunk.
        """
        with self._lock:
            return self._repair_now(chunk, max_chunks, progress)

    def _repair_now(
        self,
        chunk: int = PREFILL_CHUNK,
        max_chunks: int | None = None,
        progress: Callable[[RepairProgress], None] | None = None,
        wipe: bool = False,
    ) -> RepairProgress:
        marks = get_marks(self.cache)
        if marks.exact:
            return RepairProgress(0, 0)
        ledger = self._ledger.copy()
        ledger.set_in_cache([entry.span for entry in ledger.erased], False)
        ids = self._slot_ids(ledger)
        if self._repair is None or self._repair.chunk != chunk:
            start = marks.approximate_from or 0
            beside = growable_cache()
            if start:
                prefix = snapshot(self.cache, Span(0, start))
                beside.layers.extend(GrowableLayer() for _ in prefix)
                append(beside, prefix)
            self._repair = _Repair(beside, start, chunk)
        work = self._repair
        state = RepairProgress(cache_length(work.cache) - work.start, len(ids) - work.start)
        while not state.finished and (max_chunks is None or max_chunks > 0):
            end = min(cache_length(work.cache) + chunk, len(ids))
            device = model_device(self.model)
            extend(self.model, work.cache, Tokens(torch.tensor([ids[:end]], device=device)), chunk)
            max_chunks = None if max_chunks is None else max_chunks - 1
            state = RepairProgress(cache_length(work.cache) - work.start, len(ids) - work.start)
            if progress:
                progress(state)
        if state.finished:
            with uninterrupted():
                for layer, new in zip(self.cache.layers, work.cache.layers, strict=True):
                    layer.take_over(new)
                    if wipe:
                        new.crop(-new.get_seq_length())
                        new.wipe_spare()
                self._became_exact(ledger)
        return state

    def purge(self, receipt: EraseReceipt) -> None:
        """Make an erase final: repair exactly, then leave no id and no state of the span anywhere in this object.

        States kept for undoing *any* edit are freed, since they may have seen the span; those edits can still be
        restored by recomputing. The span's ledger positions stay, its ids are gone.

        Raises:
            RestoreError: a receipt of another context, restored before, or purged before.
        """
        with self._lock:
            record = self._record(receipt)
            if not record.receipt.tokens_removed:
                raise RestoreError(f"the {record.receipt.method} edit of {record.receipt.span} erased nothing to purge")
            self._repair_now(wipe=True)
            with uninterrupted():
                for entry in self._records.values():
                    if (undo := entry.undo()) is not None:
                        undo.clear()
                for span in record.erased:
                    self._ids.view[span.slice] = PURGED
                for layer in self.cache.layers:
                    layer.wipe_spare()
                record.purged = True
                self._became_exact(self._ledger)
                self._forget(record.erased)

    def _forget(self, spans: tuple[Span, ...]) -> None:
        """Hook: drop what else is known of purged spans (text, files)."""

    # -- looking ahead -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits_ids(self, ids: Sequence[int] | Tensor, *, from_last: bool = False) -> Tensor:
        """Logits after each of the given tokens, float32 `(tokens, vocab)`; the context stays as it is.

        Args:
            from_last: run the context's last token again first, and give the logits after it as well, as row 0.

        Raises:
            ContextError: no token at all, or an id outside the vocabulary.
        """
        with self._lock:
            new = self._checked_ids(ids).to(model_device(self.model))
            if from_last and len(self._slots) == 0:
                raise ContextError("the context is empty, so it has no last token")
            if len(new) == 0 and not from_last:
                raise ContextError("nothing to look at: the text has no tokens")
            rows = []
            with self._scratch(from_last) as cache:
                length = cache_length(cache)
                new = torch.cat([self._slots.view[length:], new])
                for a in range(0, len(new), PREFILL_CHUNK):
                    part = new[a : a + PREFILL_CHUNK]
                    where = torch.arange(length + a, length + a + len(part), device=new.device)[None]
                    output = evaluating(self.model)(
                        input_ids=part[None], position_ids=where, past_key_values=cache, use_cache=True
                    )
                    rows.append(output.logits[0].float())
            return torch.cat(rows)

    @contextmanager
    def _scratch(self, drop_last: bool) -> Iterator[DynamicCache]:
        """The cache to be run ahead (without its last slot, if wanted); as it was, bit for bit, when the block ends."""
        length = cache_length(self.cache)
        last = snapshot(self.cache, Span(length - 1, length)) if drop_last else None
        try:
            truncate(self.cache, length - drop_last)
            yield self.cache
        finally:
            with uninterrupted():
                for layer in self.cache.layers:  # an interrupted pass may have reached only some of them
                    layer.crop(min(length - drop_last - int(layer.get_seq_length()), 0))
                if last is not None:
                    append(self.cache, last)

    @torch.no_grad()
    def generate_ids(
        self, ids: Sequence[int] | Tensor = (), *, max_new_tokens: int = 64, keep: bool = False, **options: Any
    ) -> list[int]:
        """Continue the context, after `ids` when given, with `model.generate`; returns the new ids.

        Without new ids the last token is run again. Erased ids reach neither the model nor a logits processor.

        Args:
            max_new_tokens: at most so many.
            keep: append `ids` and the answer to the context; otherwise it stays as it is, bit for bit.
            options: for `model.generate` (do_sample, temperature, num_beams, ...).

        Raises:
            ContextError: an emptied context without new ids.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0 and len(self._slots) == 0:
                raise ContextError("the context is empty; give some text to continue")
            prompt = torch.cat([self._slots.view, new.to(model_device(self.model))])[None]
            beams = int(options.get("num_beams") or 1)
            rows = max(beams, int(options.get("num_return_sequences") or 1))
            settings = {"do_sample": False, "pad_token_id": self._pad_id(), **options}
            with self._scratch(len(new) == 0) as cache:
                if rows > 1:
                    cache = copy.deepcopy(cache)
                    cache.batch_repeat_interleave(rows)
                output = evaluating(self.model).generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache,
                    max_new_tokens=max_new_tokens, **settings,
                )  # fmt: skip
                answer = torch.as_tensor(output[0, prompt.shape[1] :]).cpu()
                run = len(new) + len(answer) - 1  # the last new token has not been run yet
                kept = None
                if keep and rows == 1 and len(new) and cache_length(cache) == prompt.shape[1] + len(answer) - 1:
                    kept = snapshot(cache, Span(prompt.shape[1] - len(new), prompt.shape[1] - len(new) + run))
            if keep:
                added = torch.cat([new, answer])
                if kept is not None:
                    with uninterrupted():
                        append(self.cache, kept)
                        self._register(added[:run])
                    added = added[run:]
                self.append_ids(added)
            return answer.tolist()

    def _pad_id(self) -> int:
        settings = self.model.generation_config
        for value in (settings.pad_token_id, settings.eos_token_id):
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
        return 0
