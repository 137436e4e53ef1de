"""A model as a service: its contexts, the one thread that runs them, and answering a prompt.

Knows: contexts, decoding, the worker. Does not know about HTTP or JSON.

Policies: `exact` keeps only what equals a fresh prefill, `kveraser` steers what a client took out of a conversation, `auto`
steers as well and makes the context exact while there is nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.context import ErasableContext
from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import ContextError, OptionError
from kveraser.model.view import causal_lm
from kveraser.readers import LEAST_READERS
from kveraser.serving.beside import Beside
from kveraser.serving.completion import Prompt, Reply, ReuseReport
from kveraser.serving.contexts.finding import ContextFinder
from kveraser.serving.contexts.forgetting import forget
from kveraser.serving.contexts.idle_repair import IdleRepair
from kveraser.serving.contexts.limits import Limits
from kveraser.serving.contexts.reuse import Policy
from kveraser.serving.contexts.store import ContextStore
from kveraser.serving.decoding import Decoding, Delta
from kveraser.serving.together import Next, Together
from kveraser.serving.worker import Job, Turns, Work, Worker


@dataclass(frozen=True)
class ServiceOptions:
    """How to serve.

    Attributes:
        policy: for requests that do not name one.
        readers: how many readers of what was there a request's change of its conversation recomputes, where the eraser has no number
            of its own; None: by its length, as an erase does that is asked for.
        max_residual: under `auto`, for requests that do not name one: what edits in place may leave behind; None sets no limit.
        cache_budget: bytes of keys and values in memory, all contexts together.
        state_dir: where contexts are kept; None keeps nothing beyond the process.
        queue_size: requests that may wait.
        timeout: seconds for one request, waiting included.
        grace: seconds that running requests get when the server stops.
        max_reply: tokens of a chat reply that names no limit.
        batch: replies that are made at the same time, their tokens run together; with 1, one after the other.
    """

    policy: Policy = "exact"
    readers: int | None = LEAST_READERS
    max_residual: float | None = None
    cache_budget: int = 4 << 30
    state_dir: Path | None = None
    queue_size: int = 64
    timeout: float = 300.0
    grace: float = 20.0
    max_reply: int = 1024
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("cache_budget", "queue_size", "timeout", "max_reply", "batch"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{name}={getattr(self, name)} must be more than 0")
        if self.readers is not None and self.readers < 0:
            raise OptionError(f"readers={self.readers} must be at least 0 tokens")
        if self.max_residual is not None and not 0 <= self.max_residual <= 1:
            raise OptionError(f"max_residual={self.max_residual} must be a share from 0 to 1")


class Service:
    """A model, its contexts, and the one thread that runs them.

    Raises:
        SessionFileError: the state folder is in use, or of a newer format.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eraser: KVEraser | None = None,
        options: ServiceOptions | None = None,
    ) -> None:
        self.tokenizer, self.options = tokenizer, options or ServiceOptions()
        self.eraser = eraser or default_eraser(model)
        self.vocabulary = int(causal_lm(model).get_input_embeddings().num_embeddings)
        self.limits = Limits.of(model, tokenizer, self.options.cache_budget)
        self.store = ContextStore(
            model, tokenizer, eraser, budget=self.options.cache_budget, folder=self.options.state_dir
        )
        self._finder = ContextFinder(self.store, self.limits, tokenizer, self.eraser, self.options.readers)
        self.numbers = self.store.numbers()
        """Of the store, after the last piece of work; for all threads."""
        self.beside = Beside(self.options.queue_size)
        self.worker = Worker(
            self.options.queue_size, IdleRepair(self.store).step, self._publish, Together().run, self.options.batch
        )

    def submit(self, work: Work[Any], owner: str | None = None) -> Job:
        """Queue work on the contexts.

        Args:
            owner: whose conversations it is about; None for other work.

        Raises:
            QueueFullError, JobCancelledError: too much is waiting; the server is stopping.
        """
        return self.worker.submit(work, self.options.timeout, owner)

    def check(self, prompt: Prompt) -> None:
        """Refuse what can never be answered, before it is queued.

        Raises:
            ContextError: an empty prompt, or one that is too long.
        """
        if not prompt.ids:
            raise ContextError("the prompt has no tokens")
        length, reply = len(prompt.ids), prompt.sampling.max_tokens
        self.limits.check(length + reply, f"{length} prompt tokens and {reply} for the reply")

    def complete(self, prompt: Prompt, job: Job, emit: Callable[[Delta, Reply], bool] | None = None) -> Turns[Reply]:
        """Answer a prompt; in the worker's thread, taking turns with others: a folder that is destroyed, a chunk of the prompt, or a token of
        the reply.

        Args:
            emit: called with every piece of the reply as it comes, and with the reply so far; returns whether that is enough.
        """
        started, reading = time.perf_counter(), 0.0
        forgotten = None
        if prompt.must_forget:
            forgotten = forget(self.store, self.tokenizer, prompt.owner, prompt.must_forget)
        held, reuse = self._finder.prepare(
            prompt.owner, prompt.ids, prompt.sampling.max_tokens, prompt.policy, prompt.max_residual
        )
        new = list(prompt.ids[reuse.kept :])
        held.reserved = self.limits.bytes_for(held.context.backend.length + len(new) + prompt.sampling.max_tokens)
        try:
            # Folders are destroyed to the last one, also when the client goes away: nothing finds them any more, so nothing else would.
            destroying = forgotten.destroying if forgotten else ()
            for _ in chain(destroying, _read(held.context, new[:-1], job)):
                reading += time.perf_counter() - started
                yield None
                started = time.perf_counter()
            logits = held.context.advance(new[-1:])
            held.prompt_end = len(prompt.ids) - 1
            report = ReuseReport(
                method=reuse.method,
                exact=held.exact,
                reason=reuse.reason,
                spans=reuse.spans,
                tokens_reused=reuse.kept - reuse.mended,
                tokens_recomputed=reuse.recomputed + len(new),
                seconds=reading + time.perf_counter() - started,
                recomputed=reuse.where,
                residual=0.0 if held.exact else held.residual,
                eraser=reuse.eraser,
                replacements=reuse.replacements,
                forgotten=forgotten.count if forgotten else None,
            )
            reply = Reply(report, len(prompt.ids))
            backend = held.context.backend
            decoding = Decoding(prompt.sampling, self.tokenizer, backend.ends, backend.device)
            while True:
                job.check()
                delta = decoding.draw(logits)
                reply.text += delta.text
                reply.completion_tokens += delta.sampled
                reply.tokens += delta.tokens
                reply.finish_reason = delta.finish_reason or reply.finish_reason
                reply.stopped_by = delta.stopped_by
                enough = emit is not None and emit(delta, reply)
                if enough or delta.finish_reason:
                    return reply
                logits = yield Next(held.context, decoding.token)
        finally:
            held.reserved = 0
            if len(held.context) == 0:
                self.store.forget(held)
            self.store.make_room()

    def _publish(self) -> None:
        self.numbers = self.store.numbers()

    def stop_soon(self) -> None:
        """Take up no more work; what takes longer than the grace is told so. `close` has to follow."""
        self.worker.stop_soon(self.options.grace)

    def close(self) -> None:
        """Finish what is running, write the contexts to disk, and stop."""
        self.worker.stop(self.options.grace)
        self.beside.stop()
        self.store.close()


def _read(context: ErasableContext, ids: Sequence[int], job: Job) -> Iterator[None]:
    """Have a context read more, a chunk at a time."""
    chunk = context.backend.chunk
    for at in range(0, len(ids), chunk):
        job.check()
        context.append_ids(ids[at : at + chunk])
        yield
