"""The bodies of OpenAI's requests, as far as they are served; what is not served is refused, never ignored.

Knows: field names and limits. Does not know how they are answered.

A field is either served, or harmless (a note that does not concern the reply: accepted, and without effect), or refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kveraser.serving.chat.messages import Call
from kveraser.serving.chat.messages import ChatMessage as Message
from kveraser.serving.chat.tools import Tool, ToolChoice
from kveraser.serving.decoding import Sampling
from kveraser.serving.fields import Body, Count, Role, Text, template_role
from kveraser.serving.options import Options, StopText

Note = Annotated[str, Field(max_length=1024)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20)]
_HARMLESS = "Accepted, and without effect on the reply."
_NOT_SERVED = "Not served."


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description=_HARMLESS)


class SamplingRequest(Body):
    """What chat and text completions share."""

    model: str = Field(max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    kveraser: Options | None = None
    n: Literal[1] | None = Field(None, description="One reply per request.")
    presence_penalty: Literal[0] | None = Field(None, description=_NOT_SERVED)
    frequency_penalty: Literal[0] | None = Field(None, description=_NOT_SERVED)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0, description=_NOT_SERVED)
    user: Note | None = Field(None, description=_HARMLESS)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """How to continue; what is not given is OpenAI's default."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=logprobs,
        )


class TextPart(Body):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: Text


ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]


class Definition(Body):
    """What a tool is: a function with a JSON schema for its arguments."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Without effect: arguments are always held against the schema.")


class ToolDefinition(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Definition


class NamedFunction(Body):
    """The name of a function."""

    name: ToolName


class NamedTool(Body):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class Function(Body):
    """What of a tool was called."""

    name: Note
    arguments: Text


class ToolCall(Body):
    """A call of a tool in an assistant's message."""

    id: Note
    type: Literal["function"]
    function: Function
    index: int | None = Field(None, description=_HARMLESS)


class ChatMessage(Body):
    """A message."""

    role: Role
    content: Text | list[TextPart] | None = None
    name: Note | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Note | None = None
    refusal: None = Field(None, description=_NOT_SERVED)
    annotations: list[Any] | None = Field(None, max_length=0, description=_NOT_SERVED)
    audio: None = Field(None, description=_NOT_SERVED)
    function_call: None = Field(None, description=_NOT_SERVED)

    @property
    def text(self) -> str:
        """The content as text."""
        parts = self.content
        return "".join(part.text for part in parts) if isinstance(parts, list) else parts or ""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.role == "user" and not self.text:
            raise ValueError("a user's message needs content")
        if self.role != "assistant" and self.content is None:
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def message(self) -> Message:
        """The same for every API."""
        calls = tuple(
            Call(call.id, call.function.name, _arguments(call.function.arguments)) for call in self.tool_calls or ()
        )
        return Message(template_role(self.role), self.text, self.name, calls, self.tool_call_id)


def _arguments(text: str) -> dict[str, Any] | str:
    """Arguments as templates take them; what is no JSON object stays text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


class TextFormat(Body):
    """The only response format that is served."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: list[ToolDefinition] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: a reply ends with its first call.")
    functions: list[Any] | None = Field(None, max_length=0, description=_NOT_SERVED)
    function_call: Literal["none"] | None = Field(None, description=_NOT_SERVED)
    modalities: list[Literal["text"]] | None = Field(None, max_length=1, description="Text is all there is.")
    store: Literal[False] | None = Field(None, description=_NOT_SERVED)
    metadata: dict[Note, Note] | None = Field(None, max_length=16, description=_HARMLESS)
    service_tier: Literal["auto", "default"] | None = Field(None, description=_HARMLESS)
    safety_identifier: Note | None = Field(None, description=_HARMLESS)
    prompt_cache_key: Note | None = Field(None, description=_HARMLESS)

    @property
    def choice(self) -> ToolChoice:
        """Whether tools are to be called."""
        chosen, parallel = self.tool_choice, self.parallel_tool_calls is not False
        if isinstance(chosen, NamedTool):
            return ToolChoice("required", chosen.function.name, parallel)
        return ToolChoice(chosen or "auto", None, parallel)

    def offered(self) -> tuple[Tool, ...]:
        """The tools, as templates take them."""
        return tuple(
            Tool(tool.function.name, tool.function.parameters or {}, tool.model_dump(exclude_none=True))
            for tool in self.tools or ()
        )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1, max_length=1)] = Field(
        description="One text, or the token ids of one; also in a list of one."
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = Field(None, description=_NOT_SERVED)
    best_of: Literal[1] | None = Field(None, description=_NOT_SERVED)
    suffix: Literal[""] | None = Field(None, description=_NOT_SERVED)

    @property
    def one_prompt(self) -> str | list[int]:
        """The text, or the token ids."""
        first = self.prompt[0] if isinstance(self.prompt, list) and self.prompt else None
        return first if isinstance(first, str | list) else self.prompt  # type: ignore[return-value]
