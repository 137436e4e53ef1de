"""Erasing in several sessions at once, so that the server computes their short requests in the same steps.

Knows: sessions, threads. Does not know how one erase is done. What a step costs is mostly reading the model's weights, which all
requests in it share; sessions of one server are batched by it, those of several run beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kveraser.engines.vllm.client.session import VLLMReceipt, VLLMSession, What
from kveraser.errors import KVEraserError, OptionError

MOST = 32
"""Erases under way at a time."""


def erase_together(
    erases: Sequence[tuple[VLLMSession, What]], *, undo: bool = True
) -> list[VLLMReceipt | KVEraserError]:
    """Erase something in each of several sessions.

    Args:
        erases: sessions, no one twice, and what to erase in each (see `VLLMSession.erase`).
        undo: as of `VLLMSession.erase`.

    Returns:
        For each, in the same order, its receipt, or why that one could not be done: its session is then as it was.

    Raises:
        OptionError: a session is there twice; give it all its spans at once.
    """
    if len({id(session) for session, _ in erases}) < len(erases):
        raise OptionError("a session was given twice; give all that is to be erased in it at once")

    def erase(one: tuple[VLLMSession, What]) -> VLLMReceipt | KVEraserError:
        session, what = one
        try:
            return session.erase(what, undo=undo)
        except KVEraserError as error:
            return error

    with ThreadPoolExecutor(min(len(erases), MOST) or 1) as pool:
        return list(pool.map(erase, erases))
