"""Taking a text out of everything that is cached for an owner, so that nothing of it is left in memory or on disk.

Knows: cached conversations, their texts, the store. Does not know about requests or sessions, which have purges of their own.

A conversation that says the text is cut off before it: what comes later may have read it. What was taken out of a conversation earlier
might be the text, or pieces of it: it goes as well, and with it what is not exact. All that was cut off, now or before, is overwritten;
folders on disk are let go of at once, and destroyed one after the other.
It is only a cache: a request that needs what was cut off pays for it again, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kveraser.context.text import TokenBorders, decode
from kveraser.errors import OwnerBusyError
from kveraser.serving.contexts.cards import StoredContext
from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.store import ContextStore


def says(said: str, text: str) -> bool:
    """Whether something is said in a conversation as it was rendered."""
    return any(form in said for form in _forms(text))


@dataclass(frozen=True)
class Forgotten:
    """What was done: nothing is in memory any more, nor found on disk.

    Attributes:
        count: conversations that were cut or dropped.
        destroying: destroys their folders, one after the other. It is done before anything is told, and raises `OSError` where a folder cannot
            be destroyed: forgetting again goes on with it.
    """

    count: int
    destroying: Iterator[None]


def forget(store: ContextStore, tokenizer: PreTrainedTokenizerBase, owner: str, texts: Sequence[str]) -> Forgotten:
    """Purge texts from an owner's cached conversations.

    Raises:
        OwnerBusyError: a reply is being made in one of them; nothing was changed.
    """
    if any(held.busy for held in store.conversations(owner)):
        raise OwnerBusyError(
            "replies are being made in conversations that may say the text; this waits until they are done"
        )
    cut = sum(_cut(store, tokenizer, held, texts) for held in store.conversations(owner))

    def may_say(row: StoredContext) -> bool:
        said = decode(tokenizer, row.ids.tolist())
        return row.edited or any(says(said, text) for text in texts)

    rows = store.let_go(owner, may_say)
    return Forgotten(cut + len(rows), store.destroy(rows))


def _cut(store: ContextStore, tokenizer: PreTrainedTokenizerBase, held: HeldContext, texts: Sequence[str]) -> bool:
    """Cut a conversation off before the first of the texts; whether there was anything to be cut."""
    keep = min([len(held.view), *_places(tokenizer, held, texts)])
    if held.context.erased:
        keep = min(keep, held.exact_until)
    elif keep == len(held.view):
        held.context.backend.wipe_spare()  # states of what requests dropped from its end are still behind it
        return False
    held.context = held.context.prefix(keep, take=True, wipe=True)
    held.prompt_end, held.residual = min(held.prompt_end, keep), 0.0
    if not keep:
        store.forget(held)
    return True


def _places(tokenizer: PreTrainedTokenizerBase, held: HeldContext, texts: Sequence[str]) -> Iterator[int]:
    """Where in the view the texts begin."""
    borders = TokenBorders(tokenizer, held.view.ids.tolist())
    for form in (form for text in texts for form in _forms(text)):
        at = borders.text.find(form)
        if at >= 0:
            yield borders.span(at, at + len(form)).start


def _forms(text: str) -> set[str]:
    """A text as templates may show it: trimmed, or within the JSON of a call."""
    plain = {text, text.strip()} - {""}
    return plain | {json.dumps(form, ensure_ascii=ascii_only)[1:-1] for form in plain for ascii_only in (True, False)}
