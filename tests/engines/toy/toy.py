"""A toy engine, added by the recipe in CONTRIBUTING.md: one number-crunching line stands for the model.

Knows: what a live backend must do. Does not know about ledgers, text or methods.

The state of a token is a row that depends on the token and on the mean of all rows before it, so it has read everything.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kveraser.cache import Can, Kept, slots_of
from kveraser.context import LiveBackend, LiveContext

SIZE = 16


@dataclass(frozen=True)
class ToyEraser:
    window: tuple[int, int] | None = None
    repair: int = 0
    is_neutral, steers_spans, steers_readers = False, True, False
    kind = "trained"
    choose = "next"
    calibration = None


class KeptRows(Kept):
    def __init__(self, rows):
        self.rows = rows

    nbytes = property(lambda kept: kept.rows.nbytes)

    def clear(self):
        self.rows.zero_()

    def part(self, run):
        return KeptRows(self.rows[run])

    def copy(self):
        return KeptRows(self.rows.clone())

    def overwrite(self, other):
        self.rows[:] = other.rows


class ToyBackend(LiveBackend):
    name = "toy"
    can = frozenset(Can) - {Can.READ, Can.TELL, Can.OPEN}
    stored_as = ("rows", ".bin")
    vocabulary = 400
    bytes_per_slot = 8 * SIZE

    def __init__(self):
        self.table = torch.randn(400, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.rows = torch.empty(0, SIZE, dtype=torch.float64)

    def run(self, token, seen, eraser=None):
        """The state of a token that sees some rows `(n, SIZE)`."""
        read = seen.sum(0) / max(len(seen), 1)
        return torch.tanh(self.table[token] * (1 if eraser is None else 0.1) + 0.7 * read)

    @property
    def length(self):
        return len(self.rows)

    def take(self, span):
        return KeptRows(self.rows[span.slice].clone())

    def put(self, span, states):
        self.rows = torch.cat([self.rows[: span.start], states.rows, self.rows[span.end :]])

    def crop(self, length):
        self.rows = self.rows[:length].clone()

    def extend(self, tokens, chunk=512):
        start = self.length
        try:
            for token in tokens.ids[0, start:].tolist():
                self.rows = torch.cat([self.rows, self.run(token, self.rows)[None]])
        except BaseException:
            self.crop(start)
            raise

    def delete(self, tokens, spans):
        left = tokens.without(spans)
        for span in reversed(spans):
            self.rows = torch.cat([self.rows[: span.start], self.rows[span.end :]])
        return left, (left.length - spans[0].start) * self.bytes_per_slot

    def recompute(self, tokens, span):
        for slot in span:
            self.rows[slot] = self.run(int(tokens.ids[0, slot]), self.rows[:slot])
        return len(span) * self.bytes_per_slot

    def rewrite(self, tokens, steered, repaired, eraser=None):
        work = [(slot, slots_of((*part.sees, part.slots), "cpu"), eraser) for part in steered for slot in part.slots]
        work += [(slot, part.sees, None) for part in repaired for slot in part.slots.tolist()]
        for slot, sees, by in sorted(work, key=lambda entry: entry[0]):
            self.rows[slot] = self.run(int(tokens.ids[0, slot]), self.rows[sees[sees < slot]], by)
        return len(work) * self.bytes_per_slot

    def find_eraser(self, given):
        return given or ToyEraser()

    @contextmanager
    def ahead(self, drop_last):
        self.work = self.rows[: self.length - drop_last]
        yield self._step

    def _step(self, ids, every):
        start = len(self.work)
        for token in ids:
            self.work = torch.cat([self.work, self.run(token, self.work)[None]])
        return (self.work[start if every else -1 :] @ self.table.T).float()

    def keep_ahead(self, count):
        self.rows = self.work[: self.length + count]

    def fresh(self):
        return ToyBackend()

    def take_over(self, other, *, wipe=False):
        self.rows, other.rows = other.rows, self.rows
        if wipe:
            other.rows.zero_()

    def pack(self, ids):
        return {"ids": ids.tolist()}, self.rows.numpy().tobytes()

    def unpack(self, index, data):
        self.rows = torch.tensor(memoryview(data).cast("d").tolist(), dtype=torch.float64).view(-1, SIZE)
        return torch.tensor(index["ids"], dtype=torch.long)


class ToyContext(LiveContext):
    def __init__(self, tokenizer=None, eraser=None):
        super().__init__(ToyBackend(), tokenizer, eraser)

    @classmethod
    def load(cls, folder, tokenizer=None, eraser=None):
        context = cls(tokenizer, eraser)
        context._read(folder)
        return context
