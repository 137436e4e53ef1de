"""The next tokens of several replies, run together.

Knows: contexts. Does not know about requests, or how tokens are drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kveraser.context import ErasableContext, advance_together
from kveraser.errors import UnsupportedCacheError

log = logging.getLogger("kveraser.serving")


@dataclass(frozen=True)
class Next:
    """A token to be run behind a context; what is wished for are the logits after it, float32 `(vocab,)`."""

    context: ErasableContext
    token: int


class Together:
    """Runs tokens of several contexts in one forward, or one after the other where the model cannot do that."""

    def __init__(self) -> None:
        self._one_by_one = False

    def run(self, wishes: Sequence[Next]) -> list[Tensor | Exception]:
        """What became of each: an error of one does not concern the others, whose contexts have their token."""
        if len(wishes) > 1 and not self._one_by_one:
            try:
                return [*advance_together([wish.context for wish in wishes], [wish.token for wish in wishes])]
            except UnsupportedCacheError as error:
                log.warning("tokens of several conversations are run one after the other: %s", error)
                self._one_by_one = True
            except Exception as error:  # whose it is shows when each is run by itself
                log.error("unexpected %s while %d conversations went on", type(error).__name__, len(wishes))
        return [_alone(wish) for wish in wishes]


def _alone(wish: Next) -> Tensor | Exception:
    try:
        return wish.context.advance([wish.token])
    except Exception as error:
        return error
