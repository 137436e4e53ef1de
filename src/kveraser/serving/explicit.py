"""Explicit sessions: what can be done to one, in the worker's thread.

Knows: contexts, the store. Does not know about HTTP. A change is on disk before it is acknowledged; one that fails, or
cannot be saved, is not made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

from kveraser.cache import PREFILL_CHUNK, cache_length
from kveraser.context import ErasableContext, RepairProgress
from kveraser.context.text import find_text
from kveraser.errors import ContextError, KVEraserError, RestoreError, SpanError
from kveraser.methods import EraseReceipt
from kveraser.serving.comparing import Comparison, Event, Question, compare
from kveraser.serving.contexts import Held
from kveraser.serving.decoding import Sampling
from kveraser.serving.engine import Engine, Reuse
from kveraser.serving.jobs import Job
from kveraser.serving.selection import characters_of, runs_of, spans_of_characters
from kveraser.serving.watching import Emitter, Watch
from kveraser.spans import Span

MOST_READERS = 128
"""Tokens that are shown as readers of something."""


class SessionNotFoundError(KVEraserError):
    """No session of this owner has that id."""


@dataclass(frozen=True)
class Answer:
    """A reply within a session."""

    text: str
    prompt_tokens: int
    reuse: Reuse


@dataclass(frozen=True)
class What:
    """What to erase: a text that occurs once in what is live, a message by its id, ledger spans, or characters of the
    session's text (see `selection`)."""

    text: str | None = None
    message: str | None = None
    spans: tuple[Span, ...] = ()
    characters: tuple[tuple[int, int], ...] = ()

    def spans_in(self, context: ErasableContext) -> tuple[Span, ...]:
        """The ledger spans.

        Raises:
            SpanError: no message with that id; a text that is not there, or more than once; characters that are not
                there, or erased already.
        """
        if self.characters:
            return spans_of_characters(context, self.characters)
        if self.message is not None:
            found = [span for message, span in context.messages if message.id == self.message]
            if not found:
                raise SpanError(f"the session has no message with id {self.message!r}")
            return tuple(found)
        if self.text is None:
            return self.spans
        assert context.tokenizer is not None
        ids, runs = context.live_ids, list[tuple[Span, list[int]]]()
        for run in context.live_spans:
            runs.append((run, ids[: len(run)]))
            ids = ids[len(run) :]
        return (find_text(context.tokenizer, runs, self.text),)


class Sessions:
    """Operations on the explicit sessions of an engine; every one names the owner."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.store = engine, engine.store

    def get(self, owner: str, name: str) -> Held:
        """A session.

        Raises:
            SessionNotFoundError: the owner has none with that id.
        """
        held = self.store.get(owner, name, explicit=True)
        if held is None:
            raise SessionNotFoundError(f"there is no session {name!r}")
        return held

    def create(self, owner: str) -> Held:
        """A new empty session."""
        held = self.store.new(owner, explicit=True)
        with self._saved(held):
            pass
        return held

    def delete(self, owner: str, name: str) -> None:
        """Forget a session and its files."""
        self.store.forget(self.get(owner, name))

    def append_message(self, owner: str, name: str, role: str, content: str, message_id: str | None) -> Span:
        """Process one chat message; the span of its content."""
        return self._append(owner, name, content, lambda c: c.append_message(role, content, id=message_id))

    def append_text(self, owner: str, name: str, text: str) -> Span:
        """Process text; its span."""
        return self._append(owner, name, text, lambda context: context.append(text))

    def _append(self, owner: str, name: str, text: str, change: Callable[[ErasableContext], Span]) -> Span:
        held = self.get(owner, name)
        self._fit(held, len(held.context.encode(text)) + 64)
        with self._saved(held):
            return change(held.context)

    def erase(self, owner: str, name: str, what: What, method: str, *, purge: bool = False) -> EraseReceipt:
        """Take something out; with `purge` for good: repaired exactly, then overwritten everywhere."""
        held = self.get(owner, name)
        self._fit(held, 0)
        spans = what.spans_in(held.context)
        with self._saved(held, whole=not purge):
            # Undoing a steering edit takes the span's states alone; other methods would keep the whole old suffix.
            undo = method.partition(":")[0] == "kveraser" and not purge
            receipt = held.context.erase(spans, method, undo=undo)
            if purge:
                held.context.purge(receipt)
                held.receipts.clear()
            else:
                held.receipts[receipt.id] = receipt
            return receipt

    def readers(self, owner: str, name: str, what: What) -> dict[str, Any]:
        """Who has read something: the tokens that attended to it most, each with its place and its share of attention."""
        held = self.get(owner, name)
        spans = what.spans_in(held.context)
        masses = held.context.readers(list(spans))
        count = min(MOST_READERS, int((masses > 0).sum()))
        best = masses.topk(count).indices.tolist()
        tokens = [Span(position, position + 1) for position in best]
        places = characters_of(held.context, tokens)
        total = float(masses.sum())
        return {
            "spans": [pair(span) for span in spans],
            "readers": [
                {
                    "span": pair(token),
                    "characters": list(place),
                    "text": held.context.text_of(token),
                    "read": float(masses[token.start]),
                }
                for token, place in zip(tokens, places, strict=True)
            ],
            "shown": float(masses[best].sum()) / total if total else 1.0,
        }

    def restore(self, owner: str, name: str, receipt_id: str) -> dict[str, Any]:
        """Undo an erase."""
        held = self.get(owner, name)
        self._fit(held, 0)
        found = next((receipt for receipt in held.context.receipts if receipt.id == receipt_id), None)
        if found is None:
            raise RestoreError(f"the session has no erase {receipt_id!r} that can be undone")
        with self._saved(held):
            report = held.context.restore(found)
            held.receipts.pop(receipt_id, None)
            return {"bit_exact": report.bit_exact, "exact": report.exact, "seconds": report.seconds,
                    "tokens_recomputed": report.tokens_recomputed}  # fmt: skip

    def repair(
        self,
        owner: str,
        name: str,
        job: Job,
        *,
        chunk: int = PREFILL_CHUNK,
        emit: Callable[[RepairProgress], None] | None = None,
    ) -> int:
        """Recompute exactly what approximate erases left; the number of tokens.

        Args:
            chunk: tokens that are run at once.
            emit: called after every chunk.
        """
        held = self.get(owner, name)
        if held.exact:
            return 0
        self.store.make_room(held.bytes, keep=held)
        while not (progress := held.context.repair(chunk=chunk, max_chunks=1, progress=emit)).finished:
            job.check()
        with self._saved(held):
            return progress.total

    def compare(
        self, owner: str, name: str, question: Question, job: Job, emit: Callable[[Event], None] | None = None
    ) -> Comparison:
        """Ask before the erases, now, and after recomputing; the session stays as it is.

        Args:
            emit: called with what happens as it happens.
        """
        held = self.get(owner, name)
        more = len(held.context.encode(question.prompt)) + 64 + question.max_tokens
        more += sum(map(len, held.context.erased))  # which a method may have removed
        self._fit(held, more, copies=2)
        return compare(held.context, question, job, emit)

    def generate(
        self,
        owner: str,
        name: str,
        prompt: str | None,
        sampling: Sampling,
        keep: bool,
        job: Job,
        emit: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask within a session; it stays as it is unless `keep`.

        Args:
            emit: called with the text as it comes.
        """
        held, started = self.get(owner, name), time.perf_counter()
        asked = len(held.context.encode(prompt)) + 64 if prompt else 1
        self._fit(held, asked + sampling.max_tokens)
        sampled: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if emit is not None:
            sampled["streamer"] = Emitter(self.engine.tokenizer, emit)
        watch = Watch(job)
        before, exact = cache_length(held.context.cache), held.exact

        def answer() -> str:
            return held.context.generate(
                prompt, max_new_tokens=sampling.max_tokens, keep=keep, **sampled,
                stopping_criteria=StoppingCriteriaList([watch]),
            )  # fmt: skip

        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed) if sampling.seed is not None else torch.seed()
            if keep:
                with self._saved(held, whole=False):
                    text = answer()
            else:
                text = answer()
        run = watch.prompt_length - before if watch.prompt_length > before else 1
        reuse = Reuse(
            "prefix", exact, (), watch.prompt_length - run, run, watch.first - started, residual=0.0 if exact else None
        )
        return Answer(text, watch.prompt_length, reuse)

    def show(self, owner: str, name: str) -> dict[str, Any]:
        """The ledger: messages, live and erased runs with their text, erases that can be undone."""
        held = self.get(owner, name)
        context = held.context
        erased = context.erased
        return {
            "tokens": len(context),
            "live_tokens": len(context) - sum(map(len, erased)),
            "exact": held.exact,
            "messages": [
                {"id": message.id, "role": message.role, "span": pair(span), "content": message.content,
                 "erased": any(span.overlaps(gone) for gone in erased)}
                for message, span in context.messages
            ],
            "runs": [{"span": pair(run.span), "state": "live" if run.live else "erased", "text": context.text_of(run.span)}
                     for run in runs_of(context)],
            "erases": [shown(receipt) for receipt in context.receipts],
            "recomputed": [list(place) for place in characters_of(context, _live_parts(context))],
        }  # fmt: skip

    def _fit(self, held: Held, more: int, copies: int = 1) -> None:
        """Make room for `more` tokens, in so many copies of the session, or refuse what can never fit."""
        total = cache_length(held.context.cache) + more
        if total > self.engine.context_length:
            raise ContextError(f"{total} tokens are more than the context length of {self.engine.context_length}")
        size = int(total * self.engine.token_bytes * 1.5) * copies
        if size > self.store.budget:
            times = f"{copies} times " if copies > 1 else ""
            raise ContextError(f"{times}{total} tokens do not fit into the cache budget of {self.store.budget} bytes")
        self.store.make_room(max(size - held.bytes, 0), keep=held)

    @contextmanager
    def _saved(self, held: Held, *, whole: bool = True) -> Iterator[None]:
        """A change that is on disk when the block ends. If that fails, the session is again what is on disk.

        Args:
            whole: whether a change that fails leaves the context as it was by itself.
        """
        try:
            yield
        except BaseException:
            if not whole:
                self.store.drop(held)
            raise
        try:
            self.store.save(held)
        except BaseException:
            self.store.drop(held)
            raise
        self.store.make_room()


def pair(span: Span) -> list[int]:
    """A span in JSON."""
    return [span.start, span.end]


def shown(receipt: EraseReceipt) -> dict[str, Any]:
    """A receipt in JSON."""
    return {
        "id": receipt.id,
        "method": receipt.method,
        "spans": [pair(span) for span in receipt.spans],
        "exact": receipt.exact,
        "tokens_removed": receipt.tokens_removed,
        "tokens_recomputed": receipt.tokens_recomputed,
        "recomputed": [pair(span) for span in receipt.recomputed],
        "residual": receipt.residual,
        "eraser": receipt.eraser,
        "notes": list(receipt.notes),
        "seconds": receipt.seconds,
    }


def _live_parts(context: ErasableContext) -> list[Span]:
    """What of the tokens that the erases in effect have recomputed is still live, each part within one run."""
    if context.exact:
        return []
    spans = [span for receipt in context.receipts for span in receipt.recomputed]
    both = [(max(span.start, run.start), min(span.end, run.end)) for span in spans for run in context.live_spans]
    return [Span(start, end) for start, end in both if start < end]
