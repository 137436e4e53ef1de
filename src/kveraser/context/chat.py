"""Chat messages as text: what each one adds to a rendered conversation, and where its content is.

Knows: chat templates. Does not know about caches, ids or erasing.

A conversation is always rendered whole and compared with the one before, since templates may put anything anywhere
(SmolLM2's adds a system message by itself). One whose earlier part changes when a message is added cannot be cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kveraser.errors import ContextError

_MARK = "kveraser-content-goes-here"


@dataclass(frozen=True)
class Message:
    """One message; `id` is the caller's name for it."""

    role: str
    content: str
    id: str | None = None


def new_message(messages: Sequence[Message], role: str, content: str, id: str | None) -> Message:
    """A message to follow others.

    Raises:
        ContextError: no content, or an id that is taken.
    """
    if not content.strip():
        raise ContextError(f"the {role!r} message has no content, so it would have no span")
    if id is not None and any(message.id == id for message in messages):
        raise ContextError(f"there is a message with id {id!r} already; give another one")
    return Message(role, content, id)


@dataclass(frozen=True)
class Rendered:
    """What a message adds: its text, and the character range of its content in it."""

    text: str
    content_start: int
    content_end: int


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The whole conversation as text.

    Raises:
        ContextError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not messages:
        return ""
    if not getattr(tokenizer, "chat_template", None):
        raise ContextError("the tokenizer has no chat template; use append(text), or set tokenizer.chat_template")
    entries = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(entries, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError, KeyError) as error:
        raise ContextError(f"the chat template refuses the message with role {messages[-1].role!r}: {error}") from error
    assert isinstance(text, str)
    return text


def added_by(tokenizer: PreTrainedTokenizerBase, before: Sequence[Message], message: Message) -> Rendered:
    """What one more message adds to the conversation.

    Raises:
        ContextError: the template is not prefix-stable, or does not show the content as it is.
    """
    old, new = render(tokenizer, before), render(tokenizer, [*before, message])
    text = _difference(old, new, message.role)
    # Where the content stands is read off a mark in its place: the content itself may occur in the markup as well.
    marked = _difference(old, render(tokenizer, [*before, Message(message.role, _MARK)]), message.role)
    start = marked.find(_MARK)
    content = next(
        (c for c in (message.content, message.content.strip()) if start >= 0 and text.startswith(c, start)), None
    )
    if content is None:
        raise ContextError(
            f"the chat template changes the content of {message.role!r} messages; use append(text) instead"
        )
    return Rendered(text, start, start + len(content))


def reply_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the template adds for the assistant to begin its reply."""
    return _difference(render(tokenizer, messages), render(tokenizer, messages, prompt=True), "assistant")


def _difference(old: str, new: str, role: str) -> str:
    if not new.startswith(old):
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        raise ContextError(
            f"the chat template is not prefix-stable: adding a {role!r} message changes the conversation at character "
            f"{at} ({old[at : at + 30]!r} becomes {new[at : at + 30]!r}), so what is cached no longer fits; "
            "use append(text) with a format of your own"
        )
    return new[len(old) :]
