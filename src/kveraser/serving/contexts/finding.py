"""A context for a request: the owner's conversation that saves the most, edited as the policy says.

Knows: the store, matches, policies. Does not know about HTTP, sampling or decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from kveraser.cache import cache_length
from kveraser.context.chat import Message, added_by
from kveraser.errors import ContextError
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.limits import Limits
from kveraser.serving.contexts.matching import Ids, Match, match
from kveraser.serving.contexts.reuse import Policy, Reuse, reuse_by_steering, reuse_exactly, whole_placeholders
from kveraser.serving.contexts.store import ContextStore


class ContextFinder:
    """Finds contexts for requests, and makes room for them."""

    def __init__(self, store: ContextStore, limits: Limits, tokenizer: PreTrainedTokenizerBase) -> None:
        self.store, self.limits = store, limits
        self._starts = message_starts(tokenizer)

    def prepare(self, owner: str, ids: Sequence[int], max_tokens: int, policy: Policy) -> tuple[HeldContext, Reuse]:
        """A context that holds the beginning of a prompt, at least its last token left to be run.

        Args:
            max_tokens: room that is needed for the reply.
        """
        wanted = np.asarray(ids[:-1], dtype=np.int64)
        needed = self.limits.bytes_for(len(ids) + max_tokens)
        steer = policy != "exact"
        best = self._best(owner, wanted, steer)
        if best is None:
            self.store.make_room(needed)
            return self.store.new(owner, is_session=False), Reuse("prefill")
        held, found = best
        self.store.make_room(max(needed - held.bytes, 0), keep=held)
        in_place = found.kept_until >= held.prompt_end
        # Steered slots keep their places, so a steered context may be longer than the prompt.
        fits = cache_length(held.context.cache) + len(ids) - found.new_from + max_tokens
        if steer and (found.removals or in_place) and fits <= self.limits.context_length:
            reuse = reuse_by_steering(held, found)
            held.repair = held.repair or policy == "auto"
            return held, reuse
        if in_place:
            return held, reuse_exactly(held, found)
        keep = min(found.prefix, held.exact_until)
        self.store.make_room(needed, keep=held)
        return self.store.copy(held, keep), Reuse("prefix" if keep else "prefill", kept=keep)

    def _best(self, owner: str, wanted: Ids, steer: bool) -> tuple[HeldContext, Match] | None:
        """The owner's conversation that saves the most, and what of it can be used."""
        best: tuple[int, str, Match] | None = None
        for candidate in self.store.candidates(owner):
            found = match(candidate.ids, wanted, placeholder=self.store.placeholder, starts=self._starts)
            saved = found.gain if steer else min(found.prefix, candidate.exact_until)
            if saved > 0 and (best is None or saved > best[0]):
                best = saved, candidate.id, found
        held = self.store.get(owner, best[1], is_session=False) if best else None
        return None if held is None or best is None else (held, whole_placeholders(held, best[2]))


def message_starts(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The id that begins every message of a chat, when there is one."""
    try:
        first = Message("user", "a")
        added = added_by(tokenizer, [first], Message("assistant", "b")).text
    except ContextError:
        return frozenset()
    ids = tokenizer.encode(added, add_special_tokens=False)
    return frozenset(ids[:1]) & frozenset(tokenizer.all_special_ids)
