"""A context for a request: the owner's conversation that saves the most, edited as the policy says.

Knows: the store, matches, policies. Does not know about HTTP, sampling or decoding. A conversation in which a
reply is being made is never changed: what is exact of it may be copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from kveraser.cache import cache_length
from kveraser.context.chat import Message, added_by
from kveraser.eraser import KVEraser
from kveraser.errors import ContextError
from kveraser.methods import Steering
from kveraser.readers import LEAST_READERS, READERS_PER_TOKEN
from kveraser.serving.contexts.blocks import Ids, common_length
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.limits import Limits
from kveraser.serving.contexts.matching import Match, Prices, match
from kveraser.serving.contexts.reuse import Policy, Reason, Reuse, reuse_copy, reuse_exactly, reuse_in_place
from kveraser.serving.contexts.store import Candidate, ContextStore

_LEAST = 16
"""Tokens that a change in place has to save, at least: it is a pass of its own."""


class ContextFinder:
    """Finds contexts for requests, and makes room for them.

    Args:
        eraser: what changes conversations in place.
        readers: how many of what was there a change recomputes, where the eraser does not say; None: by its length.
    """

    def __init__(
        self,
        store: ContextStore,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        eraser: KVEraser,
        readers: int | None,
    ) -> None:
        self.store, self.limits = store, limits
        self._starts = message_starts(tokenizer)
        number = readers if eraser.repair is None else eraser.repair
        self._method = Steering(repair=number)
        least, each = (LEAST_READERS, READERS_PER_TOKEN) if number is None else (number, 0)
        self._prices = Prices(max(least, _LEAST), int(eraser.steers_spans), readers=each)

    def prepare(
        self, owner: str, ids: Sequence[int], max_tokens: int, policy: Policy, max_residual: float | None = None
    ) -> tuple[HeldContext, Reuse]:
        """A context that holds the beginning of a prompt, at least its last token left to be run.

        Args:
            max_tokens: room that is needed for the reply.
            max_residual: what changes may leave behind; where it would be more, or is not known, what they change is recomputed.
        """
        wanted = np.asarray(ids[:-1], dtype=np.int64)
        needed = self.limits.bytes_for(len(ids) + max_tokens)
        best = self._best(owner, wanted, policy != "exact")
        if best is None:
            self.store.make_room(needed)
            return self.store.new(owner, is_session=False), Reuse("prefill", "new")
        held, found = best
        self.store.make_room(max(needed - held.bytes, 0), keep=held)
        goes_on = _goes_on(held, found, len(wanted)) and not held.busy
        reason = self._why_not_in_place(held, found, len(ids) + max_tokens) if policy != "exact" else "exact policy"
        if reason is None and found.changes and not goes_on and held.exact_until >= found.kept_until:
            self.store.make_room(needed, keep=held)
            held, goes_on = self.store.copy(held, found.kept_until), True  # the other branch stays as it is
        if reason is None and (found.changes or goes_on) and not held.busy:
            reuse = reuse_in_place(held, found, wanted, self._method)
            held.repair = held.repair or policy == "auto"
            if max_residual is None or (held.residual is not None and held.residual <= max_residual):
                return held, reuse
            return held, replace(reuse_exactly(held, found, "residual too large"), recomputed=reuse.recomputed)
        if goes_on:
            return held, reuse_exactly(held, found, reason or "exact policy")
        keep = min(found.prefix, held.exact_until)
        self.store.make_room(needed, keep=held)
        return self.store.copy(held, keep), reuse_copy(keep, reason)

    def _why_not_in_place(self, held: HeldContext, found: Match, length: int) -> Reason | None:
        """Why a conversation is not to be changed in place for a request of so many tokens, reply included; None if it can be."""
        if not found.worth_it:
            return "too little saved"
        # Steered slots keep their places, so a steered context may be longer than the prompt.
        fits = cache_length(held.context.cache) + length - found.new_from <= self.limits.context_length
        return None if fits else "no room"

    def _best(self, owner: str, wanted: Ids, in_place: bool) -> tuple[HeldContext, Match] | None:
        """The owner's conversation that saves the most, of several the one that is exact the longest, and what of it can be used."""
        best, chosen, found = (0, 0), None, None
        for candidate in self.store.candidates(owner):
            if min(len(candidate.ids), len(wanted)) < best[0]:  # it cannot save more, so it is not looked at
                continue
            seen = self._match(candidate, wanted) if in_place else None
            if seen is not None and candidate.busy and candidate.exact_until < seen.kept_until:
                seen = None  # it is not changed now, and only its exact beginning can be copied
            saved = seen.gain if seen else min(common_length(candidate.ids, wanted), candidate.exact_until)
            if saved > 0 and (saved, candidate.exact_until) > best:
                best, chosen, found = (saved, candidate.exact_until), candidate, seen
        held = self.store.get(owner, chosen.id, is_session=False) if chosen else None
        return None if held is None or chosen is None else (held, found or self._match(chosen, wanted))

    def _match(self, candidate: Candidate, wanted: Ids) -> Match:
        return match(candidate.ids, wanted, starts=self._starts, prices=self._prices)


def _goes_on(held: HeldContext, found: Match, length: int) -> bool:
    """Whether a request of so many ids goes on with a conversation, maybe edited, and is not another one that shares something with it.

    One that ends where the last request of the conversation ended, with other text in it, is another one: somebody fills in a form.
    """
    if found.kept_until < held.prompt_end:
        return False
    is_filled_in = any(change.added for change in found.changes)
    return not is_filled_in or found.kept_until > held.prompt_end or found.new_from < length


def message_starts(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The id that begins every message of a chat, when there is one."""
    try:
        first = Message("user", "a")
        added = added_by(tokenizer, [first], Message("assistant", "b")).text
    except ContextError:
        return frozenset()
    ids = tokenizer.encode(added, add_special_tokens=False)
    return frozenset(ids[:1]) & frozenset(tokenizer.all_special_ids)
