"""What every erasing method shares: the edit it is given, the transaction around it, the receipt it leaves.

Knows: caches, spans, token ids. Does not know about text, ledgers, or how any method works.

A method is one small frozen dataclass. It says beforehand which slots it will overwrite (`plan`), and then overwrites
them (`apply`). `EraseMethod.erase` does the rest for all of them: checks before anything is touched, keeps the old
states, crops spans that end the context, puts everything back when `apply` fails or is interrupted, and writes the receipt.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kveraser.cache import (
    EditMark,
    Marks,
    States,
    Tokens,
    append,
    cache_length,
    set_marks,
    snapshot,
    truncate,
    write,
    writing,
)
from kveraser.errors import SpanError
from kveraser.interrupts import uninterrupted
from kveraser.readers import Text
from kveraser.spans import Span, gaps, merge_spans

if TYPE_CHECKING:
    from kveraser.eraser import KVEraser

Ids = TypeVar("Ids", Tensor, list[int], list[list[int]])


@dataclass(frozen=True)
class Edit:
    """An erase to be done.

    Attributes:
        model: the user's model.
        cache: its cache, `tokens.length` slots; edited in place.
        tokens: ids, positions and mask of the slots.
        spans: slots to erase: sorted, disjoint, none of them steered, none at the very end of the cache. May be empty
            for a method that also mends what earlier edits left.
        marks: the cache's marks before the edit.
        eraser: the eraser, for the methods that need one; None leaves them to find the model's own.
        text: gives ids of some text to calibrate the model on, should that be needed; None takes what is in the cache.
    """

    model: nn.Module
    cache: Cache
    tokens: Tokens
    spans: tuple[Span, ...]
    marks: Marks
    eraser: KVEraser | None = None
    text: Text | None = None

    @property
    def length(self) -> int:
        """Number of slots before the edit."""
        return self.tokens.length

    @property
    def kept(self) -> Tensor:
        """The slots with tokens that stay, `(n,)` int64: neither steered nor to be erased."""
        stays = torch.ones(self.length, dtype=torch.bool, device=self.tokens.ids.device)
        for span in (*self.spans, *self.marks.steered_spans):
            stays[span.slice] = False
        return stays.nonzero()[:, 0]

    def neighbors(self, count: int) -> list[tuple[Span, tuple[Span, ...]]]:
        """For each of the spans, the first `count` live slots behind it (none beyond the next one), as disjoint runs."""
        return neighbors(self.spans, self.marks.steered_spans, self.length, count)

    def runs_behind(self, count: int) -> tuple[Span, ...]:
        """The first `count` live slots behind each of the spans, as disjoint runs in order."""
        return tuple(run for _, runs in self.neighbors(count) for run in runs)


def neighbors(
    spans: tuple[Span, ...], steered: tuple[Span, ...], length: int, count: int
) -> list[tuple[Span, tuple[Span, ...]]]:
    """For each of the (sorted) spans, the first `count` live slots behind it, as disjoint runs.

    Args:
        steered: slots with steering states of earlier edits; they are no live ones.
        length: number of slots.
    """
    found: list[tuple[Span, list[Span]]] = []
    at, budget = spans[0].start, 0
    blocks = sorted((*spans, *(span for span in steered if span.start > at)))
    for block in (*blocks, Span(length, length + 1)):
        taken = min(block.start - at, budget)
        if taken > 0:
            found[-1][1].append(Span(at, at + taken))
            budget -= taken
        if block in spans:
            found.append((block, []))
            budget = count
        at = block.end
    return [(span, tuple(runs)) for span, runs in found]


@dataclass(frozen=True)
class Plan:
    """What an edit will do.

    Attributes:
        layout_from: from this slot on, slots may move.
        in_place: slots before it that will be changed without being moved.
        choice: which tokens will be recomputed, for the methods that choose some.
    """

    layout_from: int
    in_place: tuple[Span, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True)
class Choice:
    """Tokens that were chosen to be recomputed, in slots before the edit.

    Attributes:
        slots: `(n,)` int64, in order.
        sees: `(m,)` int64, the slots that they see besides each other, in order.
        residual: share of the attention to the spans that is left unrepaired; None where nothing was scored.
        notes: what the user should know of how they were chosen.
    """

    slots: Tensor = field(repr=False)
    sees: Tensor = field(repr=False)
    residual: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[Span, ...]:
        """The chosen slots as runs."""
        return runs_of(self.slots)


def runs_of(slots: Tensor) -> tuple[Span, ...]:
    """Sorted slots as the fewest spans."""
    if not len(slots):
        return ()
    breaks = (slots[1:] != slots[:-1] + 1).nonzero()[:, 0].tolist()
    listed = slots.tolist()
    edges = [0, *(index + 1 for index in breaks), len(listed)]
    return tuple(Span(listed[a], listed[b - 1] + 1) for a, b in pairwise(edges))


@dataclass(frozen=True)
class Outcome:
    """What an edit did, in slots before it.

    `removed` slots are gone, `steered` ones hold steering states, `recomputed` ones new states of their own tokens;
    `eraser` is the kind of eraser that was used, the others are of the receipt.
    """

    marks: Marks
    removed: tuple[Span, ...] = ()
    steered: tuple[Span, ...] = ()
    recomputed: tuple[Span, ...] = ()
    tokens_recomputed: int = 0
    bytes_written: int = 0
    residual: float | None = None
    eraser: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Undo:
    """The states an edit replaced. Lives as long as its receipt; `clear()` overwrites and frees them."""

    length: int
    layout_from: int
    marks: Marks
    regions: list[tuple[Span, States]]
    cleared: bool = False

    @classmethod
    def take(cls, cache: Cache, plan: Plan, marks: Marks) -> Undo:
        """Copy what the plan says will change."""
        length = cache_length(cache)
        spans = [span for span in plan.in_place if span.end <= plan.layout_from]
        if plan.layout_from < length:
            spans.append(Span(plan.layout_from, length))
        return cls(length, plan.layout_from, marks, [(span, snapshot(cache, span)) for span in spans])

    def put_back(self, cache: Cache) -> None:
        """Bring the cache back to what it was, bit for bit; slots that were added later are dropped."""
        truncate(cache, self.layout_from)
        for span, states in self.regions:
            if span.start == self.layout_from:
                append(cache, states)
            else:
                write(cache, span.start, states)
        set_marks(cache, self.marks)

    @property
    def kept(self) -> tuple[Span, ...]:
        """The slots whose states are kept."""
        return tuple(span for span, _ in self.regions)

    def states_of(self, span: Span) -> States:
        """The kept states of some slots, all of one region."""
        region, states = next((r, s) for r, s in self.regions if r.start <= span.start and span.end <= r.end)
        part = slice(span.start - region.start, span.end - region.start)
        return [(keys[:, :, part], values[:, :, part]) for keys, values in states]

    def adopt(self, span: Span, states: States) -> None:
        """Keep other states for some slots, instead of or besides those that are kept."""
        for region, own in self.regions:
            a, b = max(region.start, span.start), min(region.end, span.end)
            if a >= b:
                continue
            for mine, theirs in zip(own, states, strict=True):
                for old, new in zip(mine, theirs, strict=True):
                    with torch.inference_mode(old.is_inference()):
                        old[:, :, a - region.start : b - region.start] = new[:, :, a - span.start : b - span.start]
        for run in gaps(sorted(own for own in self.kept if own.overlaps(span)), span.end, span.start):
            part = slice(run.start - span.start, run.end - span.start)
            self.regions.append(
                (run, [(keys[:, :, part].clone(), values[:, :, part].clone()) for keys, values in states])
            )

    def clear(self) -> None:
        """Overwrite the kept states with zeros and let go of them."""
        for _, states in self.regions:
            for pair in states:
                for tensor in pair:
                    with torch.inference_mode(tensor.is_inference()):
                        tensor.zero_()
        self.regions, self.cleared = [], True


@dataclass(frozen=True)
class EraseReceipt:
    """What an erase did, and what is needed to undo it.

    Attributes:
        method: name of the method.
        spans: what was erased, sorted: cache positions before the edit from `kv.erase`, ledger positions from a context.
        exact: whether the *whole* cache now equals a fresh prefill of the tokens that remain.
        tokens_removed: number of erased tokens.
        tokens_recomputed: tokens that were run through the model.
        bytes_written: bytes of keys and values that were computed or moved into the cache.
        seconds: wall-clock time.
        positions_kept: whether every remaining token is still at its old position.
        residual: an estimate of what was left behind: the share of the attention that later tokens paid to the spans and
            whose states were not recomputed. 0.0 when the result is exact, None where nothing was scored.
        recomputed: whose own tokens were run again; cache positions before the edit or ledger positions, like `spans`.
        eraser: "trained" or "neutral", for methods that use an eraser.
        notes: what did not go as asked, and why.
        removed, steered: slots (before the edit) that are gone, or hold steering states now.
        stand_ins: steered slots, and the slot whose id is shown in their place.
        id: identifies the edit.
    """

    method: str
    spans: tuple[Span, ...]
    exact: bool
    tokens_removed: int
    tokens_recomputed: int
    bytes_written: int
    seconds: float
    positions_kept: bool
    residual: float | None = None
    recomputed: tuple[Span, ...] = field(default=(), repr=False)
    eraser: str | None = None
    notes: tuple[str, ...] = ()
    removed: tuple[Span, ...] = field(default=(), repr=False)
    steered: tuple[Span, ...] = field(default=(), repr=False)
    stand_ins: tuple[tuple[Span, int], ...] = field(default=(), repr=False)
    id: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)
    undo: Undo | None = field(default=None, repr=False, compare=False)

    @property
    def span(self) -> Span:
        """The erased span; with several, the range from the first to the last."""
        return Span(self.spans[0].start, self.spans[-1].end)

    def token_ids(self, token_ids: Ids) -> Ids:
        """The ids that go with the cache now, from the ids that went with it before the edit.

        Removed tokens are dropped. Steered slots keep a place, filled with the id of the nearest token that is not
        erased, so that no logits processor or prompt look-up ever sees an erased id.

        Args:
            token_ids: `(tokens,)` or `(batch, tokens)`, a tensor or lists; the same kind is returned.
        """
        if isinstance(token_ids, Tensor):
            ids = token_ids.clone()
            for span, source in self.stand_ins:
                ids[..., span.slice] = token_ids[..., source, None]
            keep = [index for run in gaps(self.removed, ids.shape[-1]) for index in run]
            return ids[..., keep] if self.removed else ids
        return self.token_ids(torch.as_tensor(token_ids)).tolist()

    def attention_mask(self, attention_mask: Ids) -> Ids:
        """The attention mask that goes with the cache now, from the one that went with it before the edit."""
        return replace(self, stand_ins=()).token_ids(attention_mask)


def find_stand_ins(
    erased: tuple[Span, ...], removed: tuple[Span, ...], steered: tuple[Span, ...], length: int
) -> tuple[tuple[Span, int], ...]:
    """For steered slots next to what was erased, the nearest slot that stays: before the run of gone tokens, else behind.

    Older steered slots are among them when the token that stood in for them has gone now.
    """
    found = []
    for run in merge_spans((*removed, *steered), length) if removed or steered else ():
        if any(span.overlaps(run) for span in erased):
            source = run.start - 1 if run.start else run.end
            found += [(span, source) for span in steered if span.overlaps(run) and source < length]
    return tuple(found)


def split_tail(spans: tuple[Span, ...], length: int, marks: Marks) -> tuple[tuple[Span, ...], int]:
    """Take the spans that end the cache off the others; returns these and where the cache is to be cropped.

    Steered slots that would then be last are cropped with them: a context ends with a live token.
    """
    end = length
    rest = list(spans)
    steered = list(marks.steered_spans)
    while end > 0:
        if rest and rest[-1].end == end:
            end = rest.pop().start
        elif end < length and steered and steered[-1].end >= end:
            last = steered.pop()
            end = min(end, last.start) if last.end == end else end
        else:
            break
    return tuple(rest), end


class EraseMethod(ABC):
    """One way to erase spans from a cache. Subclasses are frozen dataclasses; their fields are the method's options."""

    name: ClassVar[str]
    """The name in the registry, in tables and plots."""
    summary: ClassVar[str]
    """One line for tables and `--help`."""
    exact: ClassVar[bool] = False
    """Whether the result always equals a fresh prefill."""
    needs_eraser: ClassVar[bool] = False
    """Whether it works by an eraser."""
    removes: ClassVar[bool] = True
    """Whether the spans are erased at all."""
    mends: ClassVar[bool] = False
    """Whether `apply` also repairs what earlier edits left, so that it has work to do even without spans."""
    moves_keys: ClassVar[bool] = False
    """Whether what follows the spans moves up, so that cached keys are rotated and rounded again."""
    budget_option: ClassVar[str | None] = None
    """The option that says how many tokens behind each span are recomputed, if there is one."""
    compared: ClassVar[bool] = True
    """Whether tables compare it with the others; not where it only chooses among them."""

    def with_budget(self, tokens: int) -> EraseMethod:
        """The method at so many recomputed tokens per span; methods without such an option stay as they are."""
        changed: dict[str, int] = {} if self.budget_option is None else {self.budget_option: tokens}
        return cast("EraseMethod", replace(cast("Any", self), **changed))

    @property
    def recomputes(self) -> int | None:
        """How many tokens behind each span it is told to recompute; None where that is not said."""
        return None if self.budget_option is None else getattr(self, self.budget_option)

    @abstractmethod
    def plan(self, edit: Edit) -> Plan:
        """Which slots `apply` will change. Must not change anything itself; raises when the edit cannot be done."""

    @abstractmethod
    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        """Do what `plan` said. Slots outside the plan must not be touched; on an exception the caller puts everything back."""

    def erase(
        self, edit: Edit, *, undo: bool = True, commit: Callable[[EraseReceipt], None] | None = None
    ) -> EraseReceipt:
        """Erase `edit.spans` (here they may end the cache) in one transaction.

        Args:
            undo: keep the replaced states in the receipt.
            commit: called with the receipt once the cache is edited, as part of the transaction: the caller's own
                records change together with the cache or not at all.

        Raises:
            SpanError: a span holds slots that are erased already.
        """
        started = time.perf_counter()
        self._check(edit)
        rest, end = split_tail(edit.spans, edit.length, edit.marks) if self.removes else (edit.spans, edit.length)
        inner = replace(edit, spans=rest, tokens=edit.tokens.head(end), marks=edit.marks.truncate(end))
        busy = bool(rest) or (self.mends and not inner.marks.exact)
        plan = self.plan(inner) if busy else Plan(end)
        saved = Undo.take(edit.cache, plan, edit.marks)
        committed = False
        try:
            truncate(edit.cache, end)
            with writing(edit.cache):
                outcome = self.apply(inner, plan) if busy else Outcome(inner.marks)
            removed = (*outcome.removed, Span(end, edit.length)) if end < edit.length else outcome.removed
            still = (entry for entry in edit.marks.steered_spans if not any(entry.overlaps(cut) for cut in removed))
            steered = (*outcome.steered, *still)
            receipt = EraseReceipt(
                method=self.name,
                spans=edit.spans,
                exact=outcome.marks.exact and self.removes,
                tokens_removed=sum(len(span) for span in edit.spans) if self.removes else 0,
                tokens_recomputed=outcome.tokens_recomputed,
                bytes_written=outcome.bytes_written,
                seconds=time.perf_counter() - started,
                positions_kept=not outcome.removed,
                residual=0.0 if outcome.marks.exact and self.removes else outcome.residual,
                recomputed=outcome.recomputed,
                eraser=outcome.eraser,
                notes=outcome.notes,
                removed=removed,
                steered=outcome.steered,
                stand_ins=find_stand_ins(edit.spans, removed, steered, edit.length),
                undo=saved if undo else None,
            )
            after = outcome.marks.approximate_from
            length = cache_length(edit.cache)
            in_place, before = plan.layout_from >= edit.length, edit.marks.approximate_from
            mark = EditMark(receipt.id, length, in_place, before, after, plan.in_place)
            with uninterrupted():
                if commit is not None:
                    commit(receipt)
                set_marks(edit.cache, replace(outcome.marks, edits=(*edit.marks.edits, mark)))
                committed = True
        except BaseException:
            if not committed:
                with uninterrupted():
                    saved.put_back(edit.cache)
            raise
        if not undo:
            saved.clear()
        return receipt

    @staticmethod
    def _check(edit: Edit) -> None:
        for span in edit.spans:
            for steered in edit.marks.steered_spans:
                if span.overlaps(steered):
                    raise SpanError(f"span {span} overlaps {steered}, which is erased already; restore that one first")
