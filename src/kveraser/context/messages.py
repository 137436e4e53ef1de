"""The messages of a conversation: where the content of each is, what one adds in ids, how a reply is closed, and forgetting.

Knows: rendered messages, tokenizers, ledger spans. Does not know about caches, or who runs the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kveraser.context.chat import Message, added_by, new_message, reply_prompt
from kveraser.errors import ContextError
from kveraser.spans import Span


class Conversation:
    """Messages in order, each with the ledger span of its content. Another thread which looks sees one state of it."""

    def __init__(self, messages: Iterable[Message] = (), spans: Iterable[Span] = ()) -> None:
        self._entries = tuple(zip(messages, spans, strict=True))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Message, Span]]:
        return iter(self._entries)

    @property
    def _messages(self) -> list[Message]:
        return [message for message, _ in self._entries]

    @property
    def named(self) -> list[tuple[str | None, Span]]:
        """The callers' names for messages, and where their contents are."""
        return [(message.id, span) for message, span in self]

    def enter(self, message: Message, span: Span) -> Span:
        """Note a message whose content has that span; returns it."""
        self._entries = (*self._entries, (message, span))
        return span

    def new(self, role: str, content: str, id: str | None = None) -> Message:
        """A message to follow these; see `new_message`."""
        return new_message(self._messages, role, content, id)

    def question(self, content: str) -> Message:
        """A user's message to be answered.

        Raises:
            ContextError: it has no content.
        """
        if not content.strip():
            raise ContextError("the user's message has no content; give some, or None to go on")
        return Message("user", content)

    def text_of(self, tokenizer: Any, message: Message) -> str:
        """What one more message adds to the rendered conversation."""
        return added_by(tokenizer, self._messages, message).text

    def ids_of(self, tokenizer: Any, message: Message) -> tuple[list[int], Span]:
        """What one more message adds, in ids, and which of these hold its content."""
        rendered = added_by(tokenizer, self._messages, message)
        ids, offsets = _with_offsets(tokenizer, rendered.text)
        inside = [
            number
            for number, (start, end) in enumerate(offsets)
            if end > rendered.content_start and start < rendered.content_end and end > start
        ]
        return ids, Span(inside[0], inside[-1] + 1)

    def reply_prompt(self, tokenizer: Any, question: Message | None = None) -> str:
        """What the template adds for the assistant to begin its reply, after one more message if given."""
        return reply_prompt(tokenizer, [*self._messages, question] if question else self._messages)

    def closing(
        self, tokenizer: Any, reply: str, answer: Sequence[int], question: Message | None = None, *, ended: bool
    ) -> str:
        """The text that the template puts behind a reply, after one more message if given, and that is not there yet.

        Args:
            answer: the reply's ids.
            ended: whether the last of them ends the turn.

        Raises:
            ContextError: the template shows a reply otherwise than it is.
        """
        if not reply.strip():
            return ""
        before = [*self._messages, question] if question else self._messages
        rendered = added_by(tokenizer, before, Message("assistant", reply))
        closing = rendered.text[rendered.content_end :]
        return closing.removeprefix(str(tokenizer.decode([answer[-1]]))) if ended else closing

    def enter_reply(self, reply: str, begun: int, count: int, *, ended: bool) -> None:
        """Note a reply whose `count` ids begin at `begun` in the ledger; `ended` as of `closing`."""
        self.enter(Message("assistant", reply), Span(begun, max(begun + count - ended, begun + 1)))

    def forget(self, spans: Sequence[Span]) -> None:
        """Drop the content of messages that lie in purged spans."""
        self._entries = tuple(
            (Message(message.role, "(removed)", message.id), span)
            if any(map(span.overlaps, spans))
            else (message, span)
            for message, span in self._entries
        )


def _with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise ContextError(
            f"{type(tokenizer).__name__} gives no offsets; load the fast version of the tokenizer for chat messages"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
