"""The blocks that messages consist of, as far as they are served.

Knows: field names. Does not know what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kveraser.serving.fields import Body, Text

Name = Annotated[str, Field(min_length=1, max_length=256)]
NO_EFFECT = "Accepted, and without effect on the reply."
NOT_SERVED = "Not served."


class CacheControl(Body):
    """Where a cache is to be kept: here, everything is."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cacheable(Body):
    """What a client may mark to be cached."""

    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)


class TextBlock(Cacheable):
    """Text."""

    type: Literal["text"]
    text: Text
    citations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description=NOT_SERVED)


class ThinkingBlock(Body):
    """What the model thought; shown to it as its template does."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = Field(None, description=NO_EFFECT)


class RedactedThinkingBlock(Body):
    """What another model thought, which nobody can read; not shown."""

    type: Literal["redacted_thinking"]
    data: Text


class DirectCaller(Body):
    """A call that the model made by itself."""

    type: Literal["direct"]


class ToolUseBlock(Cacheable):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]
    caller: DirectCaller | None = Field(None, description=NO_EFFECT)
    toolset_name: None = Field(None, description=NOT_SERVED)


class ToolResultBlock(Cacheable):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Text | Annotated[list[TextBlock], Field(max_length=1024)] | None = None
    is_error: bool | None = None
    toolset_name: None = Field(None, description=NOT_SERVED)


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]


def text_of(content: str | list[TextBlock] | None) -> str:
    """The text of a content; every block begins a line."""
    return "\n".join(block.text for block in content) if isinstance(content, list) else content or ""
