"""What erasing methods and live contexts act on: a cache of numbered slots with the states of tokens, whoever keeps them.

Knows: slots, ids, marks, and what can be asked of a cache. Does not know how an engine does it, or what it is asked for.

Every backend takes, puts back, crops and extends. What only some can do is declared in `can`, and methods declare what they
need; nobody finds out by asking which backend it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor

from kveraser.cache.marks import Marks, Steered
from kveraser.cache.passes import PREFILL_CHUNK, Rewrite, Window
from kveraser.cache.repair import Repair
from kveraser.cache.tokens import Tokens
from kveraser.errors import OptionError
from kveraser.spans import Span


class Can(Enum):
    """What a backend may be able to do."""

    DELETE = "move up what follows a removed span"
    OPEN = "make room between its slots"
    RECOMPUTE = "run a stretch of tokens again in its slots"
    STEER = "run tokens again under an eraser"
    RUNS = "run stretches of tokens again as if others had never been there"
    REPAIR = "run single tokens again as if others had never been there"
    TELL = "show the states by which it is told who has read a span"
    READ = "show its states and its model's weights"


class Eraser(Protocol):
    """What methods ask of an eraser; how it is applied is between it and its backend.

    Attributes:
        is_neutral: whether it runs no tokens at all, but writes states in closed form.
        steers_spans: whether it runs the erased tokens; else their states are written in closed form.
        steers_readers: whether it runs the tokens that are recomputed.
        kind: "trained" or "neutral".
        window: `(sink, local)` slots that its tokens attend to besides the span; None for the whole prefix.
        repair: tokens behind a span to recompute after it; None: by the span's length.
        choose: which ones, "readers" or "next".
        calibration: what tells readers, if it comes with that.
    """

    @property
    def is_neutral(self) -> bool: ...
    @property
    def steers_spans(self) -> bool: ...
    @property
    def steers_readers(self) -> bool: ...
    @property
    def kind(self) -> str: ...
    @property
    def window(self) -> Window | None: ...
    @property
    def repair(self) -> int | None: ...
    @property
    def choose(self) -> Any: ...
    @property
    def calibration(self) -> Any: ...
    def hide(self, backend: Any, tokens: Tokens, spans: Sequence[Span], calibration: Callable[[], Any]) -> int:
        """Let nothing attend to these slots any more; returns the bytes written. For those that do not steer spans.

        Args:
            calibration: gives what tells neutral keys, where these are written.
        """
        ...


class Kept(ABC):
    """Copies of the states of consecutive slots, in whatever form their backend has them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that they take."""

    @abstractmethod
    def clear(self) -> None:
        """Overwrite them."""

    def part(self, run: slice) -> Kept:
        """Some of the slots, as a view. Needed of backends that can repair."""
        raise NotImplementedError

    def copy(self) -> Kept:
        """An independent copy. Needed of backends that can repair."""
        raise NotImplementedError

    def overwrite(self, other: Kept) -> None:
        """Take over other states of as many slots. Needed of backends that can repair."""
        raise NotImplementedError


class Backend(ABC):
    """A cache whose slot `i` holds the states of one token, and what is done to it.

    What changes states may fail half way: whoever calls it has kept them (`take`) and puts them back.
    """

    name: ClassVar[str]
    """Of the engine, for messages."""
    can: ClassVar[frozenset[Can]] = frozenset()

    model: Any = None
    """transformers' model, where the backend can `READ`."""
    cache: Any = None
    """transformers' cache, where the backend can `READ`."""

    @property
    def closes_gaps(self) -> bool:
        """Whether tokens can be computed as if a gap before them were closed."""
        return True

    # -- slots ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of slots."""

    @property
    @abstractmethod
    def bytes_per_slot(self) -> int:
        """Bytes of the keys and values of one slot, all rows together."""

    @property
    def marks(self) -> Marks:
        """What the cache remembers of its edits; slots that were cropped since are forgotten."""
        return self._marks.truncate(self.length)

    @marks.setter
    def marks(self, marks: Marks) -> None:
        self._marks = marks

    _marks = Marks()

    def steered(self, span: Span) -> Steered:
        """The mark of slots that were just steered."""
        return Steered(span, torch.empty(0))

    @abstractmethod
    def take(self, span: Span) -> Kept:
        """A copy of the states of some slots."""

    @abstractmethod
    def put(self, span: Span, states: Kept) -> None:
        """Put copied states back into the slots they were taken from, or behind the last slot where `span` begins there."""

    def take_all(self, spans: Sequence[Span]) -> list[Kept]:
        """Copies of the states of some spans."""
        return [self.take(span) for span in spans]

    def put_all(self, regions: Sequence[tuple[Span, Kept]]) -> None:
        """`put` for several disjoint spans, those behind the last slot last."""
        for span, states in regions:
            self.put(span, states)

    @abstractmethod
    def crop(self, length: int) -> None:
        """Drop the slots behind the first `length`, and whatever a pass that failed has left."""

    def writing(self) -> AbstractContextManager[Any]:
        """What a method is applied within."""
        return nullcontext()

    def finish(self) -> None:  # noqa: B027 - most are done when a call returns
        """Wait until what was asked for is done: a clock must."""

    def check_rounding(self) -> None:  # noqa: B027 - most have one way to round
        """Raise `CacheMismatchError` where tokens would now be computed with another rounding than those in the cache."""

    def source(self) -> Any:
        """What tells who has read a span (`readers.Source`), of the states as they are. For `TELL` without `READ`."""
        self._cannot(Can.TELL)

    # -- running tokens ------------------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Tokens per forward of a long prefill."""
        return PREFILL_CHUNK

    @abstractmethod
    def extend(self, tokens: Tokens, chunk: int | None = None) -> None:
        """Run the tokens that have no slot yet (`tokens` holds all) in chunks, by default those of `chunk`, and append their states:
        all of them or none.

        New tokens see what was before spans that were hidden in place as if these were not there, where the backend can do that.
        """

    def rebuild(self, tokens: Tokens, removed: tuple[Span, ...], start: int, chunk: int) -> int:
        """Recompute everything from slot `start` on, in chunks; returns the bytes written.

        Args:
            tokens: those that stay.
            removed: slots to be dropped, all of them behind `start`.
        """
        self.crop(start)
        self.extend(tokens, chunk)
        return self.bytes_per_slot * (tokens.length - start)

    def check_movable(self) -> None:  # noqa: B027 - there may be nothing to check
        """Raise unless keys can be moved. For `DELETE`."""

    def moves_from(self, start: int) -> int:
        """The first slot whose states may change when the keys from `start` on are moved. For `DELETE`."""
        return start

    def delete(self, tokens: Tokens, spans: tuple[Span, ...]) -> tuple[Tokens, int]:
        """Drop slots and move up what follows them. For `DELETE`.

        Args:
            tokens: of all slots.

        Returns:
            The tokens that are left, and the bytes of keys and values that were moved.
        """
        self._cannot(Can.DELETE)

    def open(self, tokens: Tokens, blank: tuple[Span, ...], steered: tuple[Span, ...]) -> int:
        """Make room for tokens whose states are to be computed: what is behind them moves; returns the bytes moved. For `OPEN`.

        Args:
            tokens: of all slots, with room.
            blank: the room, in order.
            steered: slots that hold steering states, where they are then.
        """
        self._cannot(Can.OPEN)

    def recompute(self, tokens: Tokens, span: Span) -> int:
        """Run tokens again in their slots, seeing all before them; returns the bytes written. For `RECOMPUTE`."""
        self._cannot(Can.RECOMPUTE)

    def check_eraser(self, eraser: Eraser) -> None:  # noqa: B027 - any may do
        """Raise unless an eraser is one for this backend and its model. For `STEER`."""

    def check_rewrite(self, steered: Sequence[Rewrite], repaired: Sequence[Repair]) -> int:
        """Raise unless `rewrite` can do this; returns the first slot, besides those it writes, that it may change."""
        return self.length

    def rewrite(
        self, tokens: Tokens, steered: Sequence[Rewrite], repaired: Sequence[Repair], eraser: Eraser | None = None
    ) -> int:
        """Run tokens again in their slots, those of `steered` under the eraser; returns the bytes written.

        For `STEER`, `RUNS` and `REPAIR`. A backend that cannot `REPAIR` is given runs of tokens that see everything, one after the other,
        or (what it steers in a window) runs right behind.
        """
        self._cannot(Can.STEER if steered else Can.REPAIR)

    def look(self, tokens: Tokens, span: Span, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `(batch, kv_heads, tokens, head_dim)` that a fresh prefill would give a span in one layer. For `READ`."""
        self._cannot(Can.READ)

    def _cannot(self, what: Can) -> NoReturn:
        raise OptionError(f"{self.name} cannot {what.value}")
