"""Answering requests: find the context that saves the most, edit it as the policy says, read the rest, decode.

Knows: contexts, matches, the worker. Does not know about HTTP or JSON.

One thread owns the model and every context. Policies: `exact` keeps only what equals a fresh prefill, `kveraser` steers
what a client took out of a conversation, `auto` steers as well and makes the context exact while there is nothing to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.cache import PREFILL_CHUNK, cache_length
from kveraser.context.chat import Message, added_by
from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import ContextError, OptionError
from kveraser.model.view import causal_lm, model_dtype, text_config
from kveraser.serving.contexts import Held, Reused, reuse_by_steering, reuse_exactly, whole_placeholders
from kveraser.serving.decoding import Piece, Sampling, TokenLogprob, decode, end_ids
from kveraser.serving.jobs import Job, Worker
from kveraser.serving.matching import Match, match
from kveraser.serving.sessions import SessionStore

log = logging.getLogger("kveraser.serving")

Policy = Literal["exact", "kveraser", "auto"]

_GROWTH = 1.5  # a cache layer that grows takes up to this much more than it needs


@dataclass(frozen=True)
class EngineOptions:
    """How to serve.

    Attributes:
        policy: for requests that do not name one.
        cache_budget: bytes of keys and values in memory, all contexts together.
        placeholder: text that clients put in place of what they cleared; "" for none.
        state_dir: where contexts are kept; None keeps nothing beyond the process.
        queue_size: requests that may wait.
        timeout: seconds for one request, waiting included.
        grace: seconds that running requests get when the server stops.
        max_reply: tokens of a chat reply that names no limit.
    """

    policy: Policy = "exact"
    cache_budget: int = 4 << 30
    placeholder: str = "[cleared]"
    state_dir: Path | None = None
    queue_size: int = 64
    timeout: float = 300.0
    grace: float = 20.0
    max_reply: int = 1024

    def __post_init__(self) -> None:
        for name in ("cache_budget", "queue_size", "timeout", "max_reply"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{name}={getattr(self, name)} must be more than 0")


@dataclass(frozen=True)
class Reuse:
    """How a prompt got into a context.

    Attributes:
        method: `prefill`, `prefix`, `full-recompute` or `kveraser`.
        exact: whether the context equals a fresh prefill.
        spans: runs that were taken out, in tokens of the cached conversation.
        tokens_reused: tokens of the prompt whose states were there already and were left as they are.
        tokens_recomputed: tokens that were run through the model, steering included.
        recomputed: runs of the cached conversation that were recomputed where they are, in tokens like `spans`.
        residual: what the erase left behind by its own estimate; 0.0 where the context is exact, None where not known.
        eraser: "trained" or "neutral", where one was used.
        seconds: until the first token could be sampled, without waiting.
    """

    method: str
    exact: bool
    spans: tuple[tuple[int, int], ...]
    tokens_reused: int
    tokens_recomputed: int
    seconds: float
    recomputed: tuple[tuple[int, int], ...] = ()
    residual: float | None = None
    eraser: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A request: ids to be read, and how."""

    owner: str
    ids: tuple[int, ...]
    policy: Policy
    sampling: Sampling


@dataclass
class Reply:
    """An answer."""

    reuse: Reuse
    prompt_tokens: int
    text: str = ""
    finish_reason: str = "length"
    completion_tokens: int = 0
    tokens: list[TokenLogprob] = field(default_factory=list)


class Engine:
    """A model, its contexts, and the one thread that runs them.

    Raises:
        SessionFileError: the state folder is in use, or of a newer format.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eraser: KVEraser | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options or EngineOptions()
        self.eraser = eraser or default_eraser(model)
        config = text_config(model)
        self.context_length = int(config.max_position_embeddings)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.token_bytes = int(2 * config.num_hidden_layers * heads * size * model_dtype(model).itemsize)
        self.vocabulary = int(causal_lm(model).get_input_embeddings().num_embeddings)
        self.end_ids = end_ids(model)
        self._starts = _message_starts(tokenizer)
        self._placeholder = tuple(tokenizer.encode(self.options.placeholder, add_special_tokens=False))
        self.store = SessionStore(
            model, tokenizer, eraser, budget=self.options.cache_budget, placeholder=self._placeholder,
            folder=self.options.state_dir,
        )  # fmt: skip
        self.worker = Worker(self.options.queue_size, self._idle)

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queue work on the contexts.

        Raises:
            QueueFullError, JobCancelledError: too much is waiting; the server is stopping.
        """
        return self.worker.submit(work, self.options.timeout)

    def check(self, prompt: Prompt) -> None:
        """Refuse what can never be answered, before it is queued.

        Raises:
            ContextError: an empty prompt, one that is too long, or a policy that needs an eraser where there is none.
        """
        total = len(prompt.ids) + prompt.sampling.max_tokens
        if not prompt.ids:
            raise ContextError("the prompt has no tokens")
        if total > self.context_length:
            raise ContextError(
                f"{len(prompt.ids)} prompt tokens and {prompt.sampling.max_tokens} for the reply are more than the "
                f"model's context length of {self.context_length} tokens"
            )
        if total * self.token_bytes * _GROWTH > self.options.cache_budget:
            raise ContextError(
                f"{total} tokens do not fit into the cache budget of {self.options.cache_budget} bytes; "
                "a shorter prompt or a server with a larger --cache-budget is needed"
            )

    def complete(self, prompt: Prompt, job: Job, emit: Callable[[Piece, Reply], None] | None = None) -> Reply:
        """Answer a request; in the worker's thread.

        Args:
            emit: called with every piece as it comes, and with the reply so far.
        """
        started = time.perf_counter()
        held, reused = self._prepare(prompt)
        try:
            new = list(prompt.ids[reused.kept :])
            for at in range(0, len(new) - 1, PREFILL_CHUNK):
                job.check()
                held.context.append_ids(new[at : min(at + PREFILL_CHUNK, len(new) - 1)])
            logits = held.context.advance(new[-1:])
            held.prompt_end = len(prompt.ids) - 1
            reuse = Reuse(
                method=reused.method,
                exact=held.exact,
                spans=reused.spans,
                tokens_reused=reused.kept - reused.mended,
                tokens_recomputed=reused.recomputed + len(new),
                seconds=time.perf_counter() - started,
                recomputed=reused.where,
                residual=0.0 if held.exact else reused.residual,
                eraser=reused.eraser,
            )
            reply = Reply(reuse, len(prompt.ids))
            for piece in decode(held.context, logits, prompt.sampling, self.tokenizer, self.end_ids, job.check):
                reply.text += piece.text
                reply.completion_tokens += piece.sampled
                reply.tokens += piece.tokens
                reply.finish_reason = piece.finish_reason or reply.finish_reason
                if emit is not None:
                    emit(piece, reply)
            return reply
        finally:
            if len(held.context) == 0:
                self.store.forget(held)
            self.store.make_room()

    def _prepare(self, prompt: Prompt) -> tuple[Held, Reused]:
        """A context that holds the beginning of the prompt, at least its last token left to be run."""
        wanted = np.asarray(prompt.ids[:-1], dtype=np.int64)
        needed = int((len(prompt.ids) + prompt.sampling.max_tokens) * self.token_bytes * _GROWTH)
        steer = prompt.policy != "exact"
        held, found = self._find(prompt.owner, wanted, steer)
        if held is None or found is None:
            self.store.make_room(needed)
            return self.store.new(prompt.owner, explicit=False), Reused("prefill", (), 0)
        self.store.make_room(max(needed - held.bytes, 0), keep=held)
        in_place = found.kept_until >= held.prompt_end
        # Steered slots keep their places, so a steered context may be longer than the prompt.
        fits = cache_length(held.context.cache) + len(prompt.ids) - found.new_from + prompt.sampling.max_tokens
        if steer and (found.removals or in_place) and fits <= self.context_length:
            reused = reuse_by_steering(held, found, self._placeholder)
            held.repair = held.repair or prompt.policy == "auto"
            return held, reused
        if in_place:
            return held, reuse_exactly(held, found, self._placeholder)
        keep = min(found.prefix, held.exact_until(self._placeholder))
        self.store.make_room(needed, keep=held)
        return self.store.copy(held, keep), Reused("prefix" if keep else "prefill", (), keep)

    def _find(self, owner: str, wanted: Any, steer: bool) -> tuple[Held | None, Match | None]:
        """The owner's cached conversation that saves the most."""
        best: tuple[int, str] | None = None
        for candidate in self.store.candidates(owner):
            found = match(candidate.ids, wanted, placeholder=self._placeholder, starts=self._starts)
            saved = found.gain if steer else min(found.prefix, candidate.exact_until)
            if saved > 0 and (best is None or saved > best[0]):
                best = (saved, candidate.id)
        held = self.store.get(owner, best[1], explicit=False) if best else None
        if held is None:
            return None, None
        ids, _ = held.view(self._placeholder)
        found = match(ids, wanted, placeholder=self._placeholder, starts=self._starts)
        return held, whole_placeholders(held, found, self._placeholder)

    # -- idle time -----------------------------------------------------------------------------------------------

    def _idle(self) -> bool:
        """Make a steered conversation a little more exact; whether there is more to do."""
        held = self.store.to_repair()
        if held is None:
            return False
        try:
            self._repair(held)
        except Exception as error:  # it stays approximate, and says so
            log.error("a conversation could not be repaired: %s", type(error).__name__)
            held.repair, held.rebuild = False, None
        return True

    def _repair(self, held: Held) -> None:
        if held.bytes > self.options.cache_budget:  # no room for an exact copy beside it
            held.repair = False
            return
        self.store.make_room(keep=held)
        if not held.placeholders:
            held.context.repair(max_chunks=1)
            return
        ids, _ = held.view(self._placeholder)
        if held.rebuild is None:
            held.rebuild = held.context.prefix(held.exact_until(self._placeholder))
        done = len(held.rebuild)
        held.rebuild.append_ids(ids[done : done + PREFILL_CHUNK].tolist())
        if len(held.rebuild) == len(ids):
            held.context, held.rebuild, held.placeholders = held.rebuild, None, ()

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish what is running, write the contexts to disk, and stop."""
        self.worker.stop(self.options.grace)
        self.store.close()


def _message_starts(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The id that begins every message of a chat, when there is one."""
    try:
        first = Message("user", "a")
        added = added_by(tokenizer, [first], Message("assistant", "b")).text
    except ContextError:
        return frozenset()
    ids = tokenizer.encode(added, add_special_tokens=False)
    return frozenset(ids[:1]) & frozenset(tokenizer.all_special_ids)
