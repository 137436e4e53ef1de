"""What a reply holds, read from its text as it comes: thinking, text, calls.

Knows: a dialect's tags, the tools of the request. Does not know about tokens, templates or any API's JSON.

However a reply's text is cut into pieces, what is read is the same. A call is told when it is whole and right; else it is
text, as it stands, and a problem. Blanks between text and a call belong to the template, which writes them by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from kveraser.errors import BadCallError
from kveraser.serving.chat.dialects import Dialect
from kveraser.serving.chat.tools import Toolset
from kveraser.serving.decoding import overlap


@dataclass(frozen=True)
class TextPiece:
    """More text of a reply."""

    text: str


@dataclass(frozen=True)
class ThinkingPiece:
    """More of what is thought before the reply."""

    text: str


@dataclass(frozen=True)
class CallPiece:
    """A whole call; `arguments` is a JSON object."""

    name: str
    arguments: str


Piece = TextPiece | ThinkingPiece | CallPiece


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, with neighbours of one kind as one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            found[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ThinkingPiece) and isinstance(last, ThinkingPiece):
            found[-1] = ThinkingPiece(last.text + piece.text)
        else:
            found.append(piece)
    return found


class PlainReader:
    """Reads a reply that is text and nothing else."""

    problems: tuple[str, ...] = ()
    done = False

    def push(self, text: str) -> list[Piece]:
        """More text of the reply; returns what is certain by it."""
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Piece]:
        """The reply is over; returns what was held back."""
        return []


class ReplyReader:
    """Reads a reply that may think and call.

    Args:
        dialect: how calls are written; None reads none.
        tools: that may be called.
        thinking: the tags around what is thought; None reads none.
        inside: whether the reply begins within what is thought: the prompt has the first tag.

    Attributes:
        problems: why something that looks like a call is none; one entry each.
        done: whether the reply is over by what was asked for: one call. What else is pushed is not read.
    """

    def __init__(
        self, dialect: Dialect | None, tools: Toolset, thinking: tuple[str, str] | None = None, inside: bool = False
    ) -> None:
        self._dialect, self._tools, self._thinking = dialect, tools, thinking
        self._state = "thinking" if thinking and inside else "start" if thinking else "text"
        self._text, self._blanks = "", ""  # not read yet; blanks that may stand before a call
        self._fresh = True  # whether a call without an opening may begin here
        self._skip = self._state == "thinking"  # blanks, until something else comes
        self.problems: list[str] = []
        self.done = False

    def push(self, text: str) -> list[Piece]:
        """More text of the reply; returns what is certain by it."""
        if self.done:
            return []
        self._text += text
        return self._read(False)

    def finish(self) -> list[Piece]:
        """The reply is over; returns what was held back."""
        pieces = [] if self.done else self._read(True)
        return [*pieces, *self._say("")] if self._blanks and not self.done else pieces

    def _read(self, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while not self.done:
            state, text = self._state, self._text
            pieces += getattr(self, f"_read_{state}")(last)
            if (state, text) == (self._state, self._text):
                break
        return pieces

    def _read_start(self, last: bool) -> list[Piece]:
        assert self._thinking
        opening, begun = self._thinking[0], self._text.lstrip()
        if begun.startswith(opening):
            self._state, self._text, self._skip = "thinking", begun[len(opening) :], True
        elif last or not opening.startswith(begun):
            self._state = "text"
        return []

    def _read_thinking(self, last: bool) -> list[Piece]:
        assert self._thinking
        before, found, behind = self._text.partition(self._thinking[1])
        if found:
            piece = self._certain(before)
            self._state, self._text, self._blanks, self._skip = "text", behind, "", True
        else:
            held = 0 if last else overlap(before, self._thinking[1])
            piece = self._certain(before[: len(before) - held])
            self._text = before[len(before) - held :]
            if last:
                self._blanks = ""
        return [ThinkingPiece(piece)] if piece else []

    def _read_text(self, last: bool) -> list[Piece]:
        if self._dialect is None:
            before, held, found = self._text, 0, ""
        else:
            if self._fresh:
                bare = self._dialect.is_bare(self._text.lstrip(), last)
                self._fresh = bare is None
                self._state = "bare" if bare else "text"
                if bare is not False:
                    return []
            before, found, behind = self._text.partition(self._dialect.opening)
            held = 0 if found or last else overlap(before, self._dialect.opening)
        piece = self._certain(before[: len(before) - held])
        self._text = before[len(before) - held :]
        if found:
            self._state, self._text = "call", behind
        return [TextPiece(piece)] if piece else []

    def _read_bare(self, last: bool) -> list[Piece]:
        """A call without an opening; what is none is text like all other."""
        assert self._dialect
        parts = self._dialect.split(self._text.lstrip(), last)
        if parts is None and not last:
            return []
        self._state = "text"
        raw = None
        with suppress(BadCallError):
            raw = self._dialect.read(parts[0]) if parts else None
        if raw is None or parts is None or not self._tools.has(raw.name):
            return []
        try:
            return self._told(CallPiece(raw.name, self._tools.check(raw.name, raw.arguments)), parts[1])
        except BadCallError as error:
            self.problems.append(str(error))
            return []

    def _certain(self, text: str) -> str:
        """What of some text can be told: not the blanks that it ends with, since a tag may follow."""
        if self._skip:
            text = text.lstrip()
            self._skip = not text
        text = self._blanks + text
        told = text.rstrip()
        self._blanks = text[len(told) :]
        return told

    def _read_call(self, last: bool) -> list[Piece]:
        """A call, or the text that it looks like: up to the next one where it has no end."""
        assert self._dialect
        parts = self._dialect.split(self._text, last)
        if parts is None and not last:
            return []
        body, behind = parts or (self._text, "")
        try:
            raw = self._dialect.read(body)
            return self._told(CallPiece(raw.name, self._tools.check(raw.name, raw.arguments)), behind)
        except BadCallError as error:
            self.problems.append(str(error) if parts else f"the call has no end, and: {error}")
        self._state = "text"
        if parts is None:
            return self._say(self._dialect.opening)
        said, self._text = self._text[: len(self._text) - len(behind)], behind
        return self._say(self._dialect.opening + said)

    def _told(self, call: CallPiece, behind: str) -> list[Piece]:
        self._state, self._text, self._blanks = "text", behind, ""
        self._skip = self._fresh = True
        self.done = not self._tools.choice.parallel
        return [call]

    def _say(self, text: str) -> list[Piece]:
        told, self._blanks = self._blanks + text, ""
        self._skip = self._fresh = False
        return [TextPiece(told)]
