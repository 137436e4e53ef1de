"""One more token in each of several contexts, all run together.

Knows: contexts of a transformers model, what runs the tokens. Does not know how the tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from kveraser.cache import extend_rows
from kveraser.context.erasable import ErasableContext
from kveraser.errors import OptionError
from kveraser.interrupts import uninterrupted


@torch.no_grad()
def advance_together(contexts: Sequence[ErasableContext], tokens: Sequence[int]) -> list[Tensor]:
    """Append one token to each context, in one forward; the logits after each, float32 `(vocab,)`.

    As `advance` of each by itself but for the rounding of larger matrix products; one alone is run as `advance` does it.

    Args:
        contexts: of the same model, each once, none of them empty.

    Raises:
        OptionError: other contexts, or another number of tokens.
        ContextError: an id outside the vocabulary, or no room.
        UnsupportedCacheError: a model whose attention cannot be done for each by itself. In every case all contexts are as they were.
    """
    if len({id(context) for context in contexts}) != len(tokens) or len(contexts) != len(tokens):
        raise OptionError(f"{len(contexts)} contexts and {len(tokens)} tokens: one token for each context is needed")
    if any(context.model is not contexts[0].model for context in contexts):
        raise OptionError("the contexts are of several models; only those of one can be run together")
    if len(contexts) == 1:
        return [contexts[0].advance(tokens)]
    with ExitStack() as locks:
        for context in sorted(contexts, key=id):  # always in one order, so that two calls cannot wait for each other
            locks.enter_context(context._lock)
        if not all(context.backend.length for context in contexts):
            raise OptionError("an empty context cannot be run together with others; use advance")
        new = [context._checked_ids([token]) for context, token in zip(contexts, tokens, strict=True)]
        for context in contexts:
            context.backend.check_room(1)
        caches = [context.cache for context in contexts]
        with uninterrupted():
            rows = extend_rows(contexts[0].model, caches, torch.cat(new).to(contexts[0].device))
            for context, token in zip(contexts, new, strict=True):
                context._register(token)
        return list(rows)
