"""llama.cpp's cells as a backend of live contexts: what can be edited of them, and how.

Knows: cells, passes over them, GGUF erasers. Does not know about ledgers, receipts or text.

Single tokens cannot be run again, since a forward takes no mask: readers are recomputed in runs, one after the other. What
a neutral eraser hides is simply taken out; the positions stay empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from kveraser.cache import Can, Eraser, Kept, Repair, Rewrite, Tokens, Window
from kveraser.engines.llama_cpp import passes
from kveraser.engines.llama_cpp.cells import LIVE, WORK, Cells
from kveraser.engines.llama_cpp.library import VERSION
from kveraser.engines.llama_cpp.listening import LlamaCppSource
from kveraser.engines.llama_cpp.model import LlamaCppModel, NeutralEraser
from kveraser.engines.llama_cpp.packed import States
from kveraser.engines.llama_cpp.running import Running
from kveraser.eraser import Choose
from kveraser.errors import OptionError, SessionFileError
from kveraser.export import GgufEraser
from kveraser.methods.slots import runs_of
from kveraser.readers import Calibration
from kveraser.spans import Span

LENGTH = 8192
"""Default room of a context, in tokens; less where the model was trained on less."""
_ENGINE = f"llama-cpp-python {VERSION}"
_WHOLE = 512
"""Where a pass sees everything before its tokens, and that is at most so much, it is as well done beside."""
_ROUND = 64


@dataclass(frozen=True)
class LlamaCppEraser:
    """An adapter that is loaded, with the window and the repair it was trained for (see `Eraser`); None: a neutral eraser."""

    adapter: Any
    window: Window | None
    repair: int | None
    choose: Choose
    calibration: Calibration | None = None
    steers_readers = False

    @property
    def is_neutral(self) -> bool:
        return self.adapter is None

    @property
    def steers_spans(self) -> bool:
        return self.adapter is not None

    @property
    def kind(self) -> str:
        return "neutral" if self.is_neutral else "trained"

    def hide(self, backend: Any, tokens: Tokens, spans: Sequence[Span], calibration: Callable[[], Any]) -> int:
        for span in spans:
            backend.cells.remove(LIVE, span)
        return 0


class KeptCells(Kept):
    """Copies of cells in llama.cpp's own format, positions included."""

    def __init__(self, states: States) -> None:
        self.states = states

    @property
    def nbytes(self) -> int:
        return self.states.nbytes

    def clear(self) -> None:
        self.states.fill(0)


class LlamaCppBackend(Running):
    """The cells of one context.

    Args:
        model: a loaded GGUF file.
        length, keys, values, flash_attention: as of `LlamaCppContext`.

    Raises:
        OptionError: an impossible length or type.
        EngineError: llama.cpp cannot make the context.
    """

    can = frozenset({Can.DELETE, Can.RECOMPUTE, Can.STEER, Can.RUNS, Can.TELL})

    def __init__(
        self, model: LlamaCppModel, length: int | None, keys: str, values: str, flash_attention: bool | None
    ) -> None:
        if length is not None and length > model.trained_length > 0:
            raise OptionError(f"a context of {length} tokens: {model.file.name} was trained on {model.trained_length}")
        room = min(LENGTH, model.trained_length or LENGTH) if length is None else length
        super().__init__(Cells(model, room, keys, values, flash_attention))
        self.bench: passes.Bench | None = None
        self._own: GgufEraser | NeutralEraser | None = None

    def close(self) -> None:
        """Free the cells now; nothing can be done with them afterwards."""
        self.cells.close()
        if self.bench is not None:
            self.bench.cells.close()

    # -- slots ---------------------------------------------------------------------------------------------------

    @property
    def bytes_per_slot(self) -> int:
        return self.cells.bytes_per_token

    def take(self, span: Span) -> KeptCells:
        return KeptCells(self.cells.read([span]))

    def put(self, span: Span, states: Kept) -> None:
        self.cells.remove(LIVE, span)
        self.cells.write(cast("KeptCells", states).states)

    def crop(self, length: int) -> None:
        self.cells.remove(WORK)
        if (end := self.cells.end(LIVE)) > length:
            self.cells.remove(LIVE, Span(length, end))

    def source(self) -> LlamaCppSource:
        return LlamaCppSource(self.cells.model, self.cells)

    # -- running tokens ------------------------------------------------------------------------------------------

    def check_movable(self) -> None:
        self.cells.check_movable()

    def moves_from(self, start: int) -> int:
        # all keys are rotated at once, those that stay by nothing; quantised ones are thereby rounded again
        return 0 if self.cells.rounds_again else start

    def delete(self, tokens: Tokens, spans: tuple[Span, ...]) -> tuple[Tokens, int]:
        passes.delete(self.cells, spans, tokens.length)
        self.cells.settle(0)
        left = tokens.without(spans)
        return left, (left.length - spans[0].start) * self.bytes_per_slot

    def recompute(self, tokens: Tokens, span: Span) -> int:
        before = (Span(0, span.start),) if span.start else ()
        passes.rewrite(self.cells, None, tokens.ids[0, span.slice].tolist(), span, before)
        return len(span) * self.bytes_per_slot

    def find_eraser(self, given: GgufEraser | NeutralEraser | None) -> LlamaCppEraser:
        if given is None:
            given = self._own = self._own or self.cells.model.default_eraser()
        if isinstance(given, NeutralEraser):
            return LlamaCppEraser(None, None, given.repair, "readers", given.calibration)
        adapter = self.cells.model.load_adapter(given)
        return LlamaCppEraser(adapter, given.config.window, given.config.repair_next, "next")

    def check_eraser(self, eraser: Eraser) -> None:
        if not isinstance(eraser, LlamaCppEraser):
            raise OptionError(
                "a KVEraser holds weights for transformers; give the context its GGUF form: "
                "LlamaCppContext(model, model.find_eraser(folder))"
            )

    def check_rewrite(self, steered: Sequence[Rewrite], repaired: Sequence[Repair]) -> int:
        for rewrite in steered:
            if rewrite.sees and rewrite.sees[-1].end != rewrite.slots.start:
                raise OptionError(
                    "a window of a sink alone: llama.cpp needs at least 1 local slot beside it, as in (4, 1)"
                )
        pairs, _ = _pairs(steered, repaired)
        if any(repair is not None and self._beside(rewrite) for rewrite, repair in pairs):
            self.cells.check_movable()
        return self.length

    def rewrite(
        self, tokens: Tokens, steered: Sequence[Rewrite], repaired: Sequence[Repair], eraser: Eraser | None = None
    ) -> int:
        pairs, runs = _pairs(steered, repaired)
        for rewrite, behind in pairs:
            adapter = cast("LlamaCppEraser", eraser).adapter
            span, ids = rewrite.slots, tokens.ids[0, rewrite.slots.slice].tolist()
            if bench := self._bench_for(rewrite, behind):
                bench.rewrite(self.cells, adapter, ids, span, rewrite.sees)
                if behind is not None:
                    ids = tokens.ids[0, behind.slots].tolist()
                    bench.rewrite_behind(self.cells, ids, behind.absent[0], runs_of(behind.slots))
                continue
            passes.rewrite(self.cells, adapter, ids, span, rewrite.sees)
            runs += [behind] if behind is not None else []
        for repair in runs:
            ids = tokens.ids[0, repair.slots].tolist()
            passes.rewrite_runs(self.cells, ids, runs_of(repair.slots), runs_of(repair.sees))
        return self.bytes_per_slot * (sum(map(len, steered)) + sum(map(len, repaired)))

    def _bench_for(self, rewrite: Rewrite, repair: Repair | None) -> passes.Bench | None:
        """The small cache to run a span in; None when it has to be done in the user's."""
        if not self._beside(rewrite):
            return None
        shown, behind = sum(map(len, rewrite.sees)), len(repair) if repair else 0
        known = self.bench
        if known is None or shown > known.shown or behind > known.repair:
            if known is not None:
                known.cells.close()
            self.bench = known = passes.Bench(self.cells, -(-shown // _ROUND) * _ROUND, -(-behind // _ROUND) * _ROUND)
        return known

    def _beside(self, rewrite: Rewrite) -> bool:
        """Whether a span can be run in a small cache: not too long, with something shown that is not the whole long prefix, and
        no hidden slot right before it."""
        start, shown = rewrite.slots.start, sum(map(len, rewrite.sees))
        small = len(rewrite) <= passes.Bench.SPAN and (shown < start or shown <= _WHOLE)
        return small and (start == 0 or (shown > 0 and self.cells.holds(start - 1)))

    # -- other caches --------------------------------------------------------------------------------------------

    def fresh(self) -> Self:
        return type(self)(self.cells.model, self.cells.length, **self.cells.settings)  # type: ignore[arg-type]

    def take_over(self, other: Self, *, wipe: bool = False) -> None:
        self.cells, other.cells = other.cells, self.cells
        if wipe:
            other.cells.wipe()

    def wipe_spare(self) -> None:
        used = self._all()
        self.cells.wipe()
        self.cells.write(used)
        if self.bench is not None:
            self.bench.cells.wipe()

    # -- files ---------------------------------------------------------------------------------------------------

    def pack(self, ids: Tensor) -> tuple[dict[str, Any], bytes]:
        index = {"engine": _ENGINE, "model": self.cells.model.identity(), "length": self.cells.length}
        return {**index, "settings": self.cells.settings, "ids": ids.tolist()}, self._all().tobytes()

    def unpack(self, index: dict[str, Any], data: bytes) -> Tensor:
        self.cells.write(np.frombuffer(data, np.uint8).copy())
        return torch.tensor(index["ids"], dtype=torch.long)

    def _all(self) -> States:
        return self.cells.read([Span(0, self.length)]) if self.length else np.empty(0, np.uint8)


def check_saved(index: dict[str, Any], model: LlamaCppModel) -> None:
    """Raise `SessionFileError` unless a saved session is of this model and this llama.cpp."""
    if index["engine"] != _ENGINE:
        raise SessionFileError(f"the session was saved by {index['engine']}; this is {VERSION}, whose cells may differ")
    if index["model"] != model.identity():
        raise SessionFileError(f"the session was saved with another model: {index['model']}")


def _pairs(
    steered: Sequence[Rewrite], repaired: Sequence[Repair]
) -> tuple[list[tuple[Rewrite, Repair | None]], list[Repair]]:
    """Every piece that is steered, with what is repaired right behind it in the same window; and all else that is repaired."""
    behind: dict[int, Repair] = {}
    rest = []
    for repair in repaired:
        own = set(repair.slots.tolist())
        sees = {slot for slot in repair.sees.tolist() if slot not in own}
        end = repair.absent[0].end if repair.absent else -1
        fits = any(rewrite.slots.end == end and sees == _window(rewrite, repair.absent[0]) for rewrite in steered)
        if fits and end not in behind:
            behind[end] = repair
        else:
            rest.append(repair)
    return [(rewrite, behind.get(rewrite.slots.end)) for rewrite in steered], rest


def _window(rewrite: Rewrite, span: Span) -> set[int]:
    """The slots before a span that a piece of it sees."""
    return {slot for run in rewrite.sees for slot in run if slot < span.start}
