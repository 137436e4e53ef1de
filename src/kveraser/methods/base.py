"""What the author of an erasing method writes against: the edit it is given, the plan and the outcome it gives back.

Knows: backends, spans, token ids. Does not know about text, ledgers, undoing, or how any method works.

A method is one small frozen dataclass. It says beforehand which slots it will overwrite (`plan`), and then overwrites
them (`apply`). What all of them share is around them: checks, undo, roll-back and the receipt (`transaction.py`). Where slots lie
is in `lying.py`, what tables and plots want to know of a method in `comparing.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from kveraser.cache import Backend, Can, Eraser, Marks, Tokens
from kveraser.methods.choice import Choice
from kveraser.methods.comparing import Compared
from kveraser.methods.lying import Lying
from kveraser.readers import Calibration, Text
from kveraser.spans import Span


@dataclass(frozen=True)
class Edit(Lying):
    """An erase to be done. Which slots stay, go or are free is told by `Lying`.

    Attributes:
        backend: the cache, `tokens.length` slots, and what runs its tokens; edited in place.
        tokens: ids, positions and mask of the slots.
        spans: slots to erase: sorted, disjoint, none of them steered, none at the very end of the cache. May be empty
            for a method that also mends what earlier edits left.
        marks: the cache's marks before the edit.
        find_eraser: gives the eraser, for the methods that need one: the caller's, or the model's own.
        text: gives ids of some text to calibrate the model on, should that be needed; None takes what is in the cache.
        new: for each of the spans how many new tokens are to stand in its first slots; () for an erase. A method that plans finds
            their ids in `tokens`, and as many slots as they need.
        blank: slots that were added for them and hold nothing yet, each at the end of a span.
        calibrated: the calibration that was made for this edit, if one was: of little text, it is kept nowhere else.
    """

    backend: Backend
    tokens: Tokens
    spans: tuple[Span, ...]
    marks: Marks
    find_eraser: Callable[[], Eraser]
    text: Text | None = None
    new: tuple[int, ...] = ()
    blank: tuple[Span, ...] = ()
    calibrated: list[Calibration] = field(default_factory=list, repr=False, compare=False)


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


class EraseMethod(Compared):
    """One way to erase spans from a cache. Subclasses are frozen dataclasses; their fields are the method's options."""

    name: ClassVar[str]
    """The name in the registry, in tables and plots."""
    summary: ClassVar[str]
    """One line for tables and `--help`."""
    needs: ClassVar[frozenset[Can]] = frozenset()
    """What a backend must be able to do for it, besides keeping, cropping and growing."""
    exact: ClassVar[bool] = False
    """Whether the result always equals a fresh prefill."""
    needs_eraser: ClassVar[bool] = False
    """Whether it works by an eraser."""
    removes: ClassVar[bool] = True
    """Whether the spans are erased at all."""
    replaces: ClassVar[bool] = False
    """Whether it knows of new tokens (`Edit.new`), so that it can replace."""
    rebuilds: ClassVar[bool] = False
    """Whether it computes all that follows anew, so that longer text needs no room to be made."""
    mends: ClassVar[bool] = False
    """Whether `apply` also repairs what earlier edits left, so that it has work to do even without spans."""
    moves_keys: ClassVar[bool] = False
    """Whether what follows the spans moves up, so that cached keys are rotated and rounded again."""

    def chosen(self, edit: Edit) -> EraseMethod:
        """The method that does an edit: this one, unless it only chooses among others, and then needs none of the following."""
        return self

    def plan(self, edit: Edit) -> Plan:
        """Which slots `apply` will change. Must not change anything itself; raises when the edit cannot be done."""
        raise NotImplementedError

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        """Do what `plan` said. Slots outside the plan must not be touched; on an exception the caller puts everything back."""
        raise NotImplementedError
