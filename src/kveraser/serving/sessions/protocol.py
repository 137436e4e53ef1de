"""The bodies of requests to sessions; a field that is not known is refused.

Knows: field names and limits. Does not know what is done with them.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kveraser.serving.decoding import Sampling
from kveraser.serving.fields import Body, Count, Role, Text
from kveraser.serving.sessions.comparing import Question
from kveraser.serving.sessions.selection import Selection
from kveraser.spans import Span

Position = Annotated[int, Field(ge=0, le=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class NewMessage(Body):
    """A message to be appended."""

    role: Role
    content: Text
    id: Name | None = Field(None, description="A name by which the message can be erased.")


class NewText(Body):
    """Text to be appended as it is."""

    text: Text = Field(min_length=1)


class SelectionBody(Body):
    """What in a session: exactly one of `text`, `message`, `spans`, `characters`."""

    text: Text | None = Field(None, description="A text that occurs once in what is live.")
    message: Name | None = Field(None, description="The id of a message.")
    spans: Annotated[list[tuple[Position, Position]], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Half-open token spans of the ledger."
    )
    characters: Annotated[list[tuple[Position, Position]], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Half-open ranges of code points in the session's text: that of its `runs`, joined."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.text, self.message, self.spans, self.characters)) != 1:
            raise ValueError("exactly one of text, message, spans and characters is needed")
        return self

    def selection(self) -> Selection:
        """The same for sessions."""
        spans = tuple(Span(start, end) for start, end in self.spans or ())
        return Selection(self.text, self.message, spans, tuple(self.characters or ()))


class EraseBody(SelectionBody):
    """What to erase, and how."""

    method: str = Field("kveraser", max_length=256, description="A name, or NAME:OPTION=VALUE,...")
    purge: bool = Field(False, description="Make it final: repaired exactly, then overwritten everywhere.")


class ReplaceBody(SelectionBody):
    """What to replace, by what, and how."""

    new: Text = Field(description="The text that stands there from now on; an empty one erases.")
    method: str = Field("kveraser", max_length=256, description="A name, or NAME:OPTION=VALUE,...")


class ReceiptBody(Body):
    """Which erase is meant."""

    erase: Name = Field(description="The id of the erase.")


class GenerateBody(Body):
    """A question, or nothing to go on with what is there."""

    prompt: Text | None = None
    max_tokens: Count = 64
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    keep: bool = Field(False, description="Append question and reply to the session.")
    stream: bool = Field(False, description="Server-sent events: `text` as it comes, then one with all but the text.")

    def sampling(self) -> Sampling:
        """How to continue."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


class CompareBody(Body):
    """A question to every version of a session."""

    prompt: Text = Field(min_length=1, description="A user's message if the session is a chat, else text as it is.")
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
    first_line: bool = Field(False, description="End every answer with its first line that is not blank.")
    top: Annotated[int, Field(ge=1, le=20)] = Field(5, description="The most likely tokens to report of every version.")
    stream: bool = Field(
        False,
        description="Server-sent events, each of one `version`: `done` of `total` tokens read, more `text`, or `answer` "
        "with all that is known of it; the last has `distributions`.",
    )

    def question(self) -> Question:
        """The same for a comparison."""
        return Question(self.prompt, self.max_tokens, self.first_line, self.top)
