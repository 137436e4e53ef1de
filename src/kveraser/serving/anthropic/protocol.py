"""The bodies of Anthropic's requests, as far as they are served; what is not served is refused, never ignored.

Knows: field names and limits. Does not know how they are answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kveraser.serving.anthropic.blocks import (
    NO_EFFECT,
    AssistantBlock,
    Cacheable,
    CacheControl,
    Name,
    TextBlock,
    UserBlock,
)
from kveraser.serving.chat.tools import Tool, ToolChoice
from kveraser.serving.fields import Body, Count, Text
from kveraser.serving.options import Options, StopText

_Number = Annotated[int, Field(ge=0, le=1 << 30)]


class UserMessage(Body):
    """What the user says, and results of tools."""

    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(min_length=1, max_length=4096)]


class AssistantMessage(Body):
    """What the model said, thought and called. The last message of a request is continued."""

    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(max_length=4096)]


class SystemMessage(Body):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: Text | list[TextBlock]


AnyMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class ToolBody(Cacheable):
    """A tool that the client runs; Anthropic's own tools are not served."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="Without effect: inputs are always held against the schema.")
    eager_input_streaming: bool | None = Field(None, description="Without effect: an input is told when it is right.")

    def tool(self) -> Tool:
        """The same for every API."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        known = {name: value for name, value in function.items() if value is not None}
        return Tool(self.name, self.input_schema, {"type": "function", "function": known})


class AutoChoice(Body):
    """The model calls what it likes, or has to call something (`any`)."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Body):
    """The one tool to call."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    """No tool is called."""

    type: Literal["none"]


class Thinking(Body):
    """Whether the model thinks first, where its template has a switch for that."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Count | None = Field(None, description="Not enforced: what is thought counts for `max_tokens`.")
    display: Literal["summarized"] | None = Field(None, description="Without effect: it is told as it is.")


class InputTokens(Body):
    """So many tokens of the prompt."""

    type: Literal["input_tokens"]
    value: _Number


class ToolUses(Body):
    """So many calls with their results."""

    type: Literal["tool_uses"]
    value: _Number


class ThinkingTurns(Body):
    """So many replies that had thinking in them."""

    type: Literal["thinking_turns"]
    value: Annotated[int, Field(ge=1, le=1 << 30)]


class AllThinking(Body):
    """All of them."""

    type: Literal["all"]


class ClearToolUses(Body):
    """Clear the results of old calls."""

    type: Literal["clear_tool_uses_20250919"]
    trigger: Annotated[InputTokens | ToolUses, Field(discriminator="type")] = InputTokens(
        type="input_tokens", value=100_000
    )
    keep: ToolUses = ToolUses(type="tool_uses", value=3)
    clear_at_least: InputTokens | None = None
    exclude_tools: Annotated[list[Name], Field(max_length=1024)] | None = None
    clear_tool_inputs: bool | Annotated[list[Name], Field(max_length=1024)] | None = None


class ClearThinking(Body):
    """Clear what was thought before old replies."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | Annotated[ThinkingTurns | AllThinking, Field(discriminator="type")] = ThinkingTurns(
        type="thinking_turns", value=1
    )


Edit = Annotated[ClearToolUses | ClearThinking, Field(discriminator="type")]


class ContextManagement(Body):
    """What the server clears before the model reads the conversation."""

    edits: Annotated[list[Edit], Field(max_length=8)] | None = None


class Metadata(Body):
    """Who asks."""

    user_id: Annotated[str, Field(max_length=1024)] | None = None


class CountRequest(Body):
    """`POST /v1/messages/count_tokens`."""

    model: str = Field(max_length=1024)
    messages: list[AnyMessage] = Field(min_length=1, max_length=4096)
    system: Text | Annotated[list[TextBlock], Field(max_length=1024)] | None = None
    tools: list[ToolBody] | None = Field(None, max_length=512)
    tool_choice: Annotated[AutoChoice | NamedChoice | NoChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    context_management: ContextManagement | None = None
    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)

    @property
    def choice(self) -> ToolChoice:
        """Whether tools are to be called."""
        chosen = self.tool_choice
        if chosen is None or isinstance(chosen, NoChoice):
            return ToolChoice("auto" if chosen is None else "none")
        parallel = not chosen.disable_parallel_tool_use
        if isinstance(chosen, NamedChoice):
            return ToolChoice("required", chosen.name, parallel)
        return ToolChoice("auto" if chosen.type == "auto" else "required", None, parallel)


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=64)] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    metadata: Metadata | None = Field(None, description=NO_EFFECT)
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description=NO_EFFECT)
    thread: dict[str, Any] | None = Field(
        None, description="Not served; refused in a way that clients know to do without."
    )
    kveraser: Options | None = None
