"""Running tokens behind llama.cpp's live cells, to stay there or only to look ahead.

Knows: cells. Does not know about erasing or text, or how a token is chosen.

Looking ahead happens on the work sequence, which shares the live cells: these are not touched, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kveraser.cache import Tokens
from kveraser.context import LiveBackend, Run
from kveraser.engines.llama_cpp.cells import BATCH, LIVE, WORK, Cells
from kveraser.interrupts import uninterrupted
from kveraser.spans import Span


class Running(LiveBackend):
    """The part of a backend that runs new tokens."""

    name = "llama.cpp"
    stored_as = ("cells", ".bin")

    def __init__(self, cells: Cells) -> None:
        self.cells = cells

    @property
    def length(self) -> int:
        return self.cells.end(LIVE)

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self.cells.length

    @property
    def vocabulary(self) -> int:
        return self.cells.model.vocabulary

    def ends(self, token: int) -> bool:
        return self.cells.model.tokenizer.ends(token)

    @contextmanager
    def ahead(self, drop_last: bool) -> Iterator[Run]:
        start = self.length - drop_last
        self.cells.remove(WORK)
        try:
            if start:
                self.cells.share(LIVE, WORK, Span(0, start))
            yield self._run
        finally:
            with uninterrupted():
                self.cells.remove(WORK)

    def _run(self, ids: list[int], every: bool) -> Tensor:
        return torch.from_numpy(self.cells.run(ids, self.cells.end(WORK), WORK, "all" if every else "last"))

    def keep_ahead(self, count: int) -> None:
        self.cells.share(WORK, LIVE, Span(self.length, self.length + count))

    def extend(self, tokens: Tokens, chunk: int | None = None) -> None:
        start = self.length
        try:
            self.cells.run(tokens.ids[0, start:].tolist(), start, LIVE, chunk=min(chunk or self.chunk, BATCH))
        except BaseException:
            with uninterrupted():
                self.crop(start)
            raise
