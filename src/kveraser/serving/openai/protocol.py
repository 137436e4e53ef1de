"""The bodies of OpenAI's requests, as far as they are served; what is not served is refused, never ignored.

Knows: field names and limits. Does not know how they are answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kveraser.serving.contexts.reuse import Policy
from kveraser.serving.decoding import Sampling
from kveraser.serving.fields import Count, Text

StopText = Annotated[str, Field(min_length=1, max_length=256)]


class Options(BaseModel):
    """The field `kveraser` of a request (`extra_body` of the OpenAI client)."""

    model_config = ConfigDict(extra="forbid")
    policy: Policy | None = Field(
        None, description="How edits of a cached conversation are done; default: the server's."
    )


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class SamplingRequest(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(allow_inf_nan=False)
    model: str = Field(max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: Literal[1] | None = Field(None, description="One reply per request.")
    presence_penalty: Literal[0] | None = Field(None, description="Not served.")
    frequency_penalty: Literal[0] | None = Field(None, description="Not served.")
    logit_bias: dict[str, Any] | None = Field(None, max_length=0, description="Not served.")
    kveraser: Options = Options(policy=None)

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


class TextPart(BaseModel):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """A message; other fields (`tool_calls`, `tool_call_id`, `name`) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: str = Field(min_length=1, max_length=64)
    content: Text | list[TextPart] | None = None

    def entry(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        return {**self.model_dump(exclude={"content"}), "content": text}


class TextFormat(BaseModel):
    """The only response format that is served."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="Not served; tool results in messages are.")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20)] = Field(
        description="One text, or the token ids of one."
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = Field(None, description="Not served.")
    best_of: Literal[1] | None = Field(None, description="Not served.")
    suffix: Literal[""] | None = Field(None, description="Not served.")
