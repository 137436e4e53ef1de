"""A prompt and its reply, read piece by piece as the service makes it; in the worker's thread.

Knows: the service, readers. Does not know about HTTP or any API's JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kveraser.serving.chat.reading import CallPiece, Piece, PlainReader, joined
from kveraser.serving.chat.rendering import Reader
from kveraser.serving.completion import Prompt, Reply
from kveraser.serving.decoding import Delta
from kveraser.serving.service import Service
from kveraser.serving.worker import Job, Turns


@dataclass(frozen=True)
class Asked:
    """A prompt, and how its reply is to be read; the reply begins with `told`."""

    prompt: Prompt
    told: str = ""
    reader: Callable[[], Reader] = PlainReader


@dataclass
class Answer:
    """A reply, and what it holds, as far as it is known.

    Attributes:
        problems: why something in it that looks like a call is none; None where there are no tools.
    """

    reply: Reply
    pieces: list[Piece] = field(default_factory=list)
    problems: list[str] | None = None

    @property
    def calls(self) -> bool:
        """Whether it has calls."""
        return any(isinstance(piece, CallPiece) for piece in self.pieces)

    def report(self) -> dict[str, Any]:
        """The object `kveraser` of a reply, in every API."""
        problems = {} if self.problems is None else {"malformed_calls": list(self.problems)}
        return {**asdict(self.reply.reuse), **problems}


Progress = tuple[Delta, list[Piece], Answer]
"""What is new of a reply: its tokens, what is certain by them; and the answer so far."""


def answer(service: Service, asked: Asked, job: Job, emit: Callable[[Progress], None] | None = None) -> Turns[Answer]:
    """Answer a prompt, taking turns with others.

    Args:
        emit: called with every piece of the answer as it comes.
    """
    reader, found = asked.reader(), list[Answer]()
    told = asked.told

    def tell(delta: Delta, reply: Reply) -> bool:
        nonlocal told
        if not found:
            found.append(Answer(reply, problems=None if isinstance(reader, PlainReader) else reader.problems))
        new = reader.push(told + delta.text)
        told = ""
        if reader.done and not delta.finish_reason:
            delta, reply.finish_reason = replace(delta, finish_reason="stop"), "stop"
        if delta.finish_reason:
            new += reader.finish()
        found[0].pieces = joined([*found[0].pieces, *new])
        if emit is not None:
            emit((delta, new, found[0]))
        return reader.done

    yield from service.complete(asked.prompt, job, tell)
    return found[0]
