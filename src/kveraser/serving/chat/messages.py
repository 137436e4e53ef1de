"""A conversation as all APIs have it in common.

Knows: messages, calls, their ids. Does not know about templates, tokens or any API's JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kveraser.errors import UnknownCallError


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` are text only where they are no JSON object, as in a call that a client made up."""

    id: str
    name: str
    arguments: dict[str, Any] | str


@dataclass(frozen=True)
class ChatMessage:
    """One message.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        name: of the speaker, or of the tool that gave a result.
        calls: that an assistant's message makes.
        call_id: the call that a tool's message is the result of.
        reasoning: what an assistant thought before it spoke.
    """

    role: str
    text: str = ""
    name: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    reasoning: str | None = None


def with_tool_names(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """The messages, with every result named by the tool that was called.

    Raises:
        UnknownCallError: a result names a call that no message before it made.
    """
    names: dict[str, str] = {}
    named = []
    for index, message in enumerate(messages):
        names |= {call.id: call.name for call in message.calls}
        if message.call_id is not None:
            if message.call_id not in names:
                raise UnknownCallError(index, message.call_id)
            message = replace(message, name=message.name or names[message.call_id])
        named.append(message)
    return tuple(named)
