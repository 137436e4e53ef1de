"""What the model's chat template can do, found out by trying it: does it show tools, in what form calls, what is thought?

Knows: chat templates, dialects. Does not know about token ids, requests or replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kveraser.errors import ApiError
from kveraser.serving.chat.dialects import DIALECTS, Dialect
from kveraser.serving.chat.messages import Call, ChatMessage
from kveraser.serving.chat.reading import CallPiece, ReplyReader
from kveraser.serving.chat.tools import Tool, ToolChoice, Toolset

_PROBE = "kveraser_probe"
_ARGUMENTS = {"kveraser_key": "a value"}
_PARAMETERS = {"type": "object", "properties": {"kveraser_key": {"type": "string"}}}
_PROBE_TOOL = Tool(
    _PROBE,
    _PARAMETERS,
    {"type": "function", "function": {"name": _PROBE, "description": "a probe", "parameters": _PARAMETERS}},
)
_THINKING = ("<think>", "</think>")


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool = True,
        thinking: bool | None = None,
    ) -> str:
        """A conversation as text.

        Args:
            tools: as templates take them.
            prompt: whether the assistant is about to reply.
            thinking: whether the template is to have the model think; None leaves it as it is.

        Raises:
            ApiError: the template refuses it.
        """
        entries = [_entry(message) for message in messages]
        options = {} if thinking is None else {"enable_thinking": thinking}
        given = [dict(tool) for tool in tools] or None
        try:
            text = self._tokenizer.apply_chat_template(
                entries, tools=given, tokenize=False, add_generation_prompt=prompt, **options
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from error
        return str(text)

    @cached_property
    def thinking(self) -> tuple[str, str] | None:
        """The tags around what the model thinks before it replies; None where the template knows none."""
        source = str(self._tokenizer.chat_template)
        return _THINKING if all(tag in source for tag in _THINKING) else None

    @cached_property
    def _found(self) -> Dialect | str:
        """The dialect of calls, or why tools cannot be used."""
        ask = ChatMessage("user", "a question")
        call = ChatMessage("assistant", calls=(Call("abcdefghi", _PROBE, _ARGUMENTS),))
        try:
            shown = self.render([ask], [_PROBE_TOOL.shown])
            if _PROBE not in shown:
                return "the chat template of this model does not show tools to it"
            called = self.render([ask, call], [_PROBE_TOOL.shown], prompt=False)
        except ApiError as error:
            return f"the chat template of this model cannot show tools and calls ({error})"
        text = called[_common(shown, called) :]
        toolset = Toolset.of([_PROBE_TOOL], ToolChoice())
        for dialect in DIALECTS:
            reader = ReplyReader(dialect, toolset)
            calls = [piece for piece in [*reader.push(text), *reader.finish()] if isinstance(piece, CallPiece)]
            if [piece.name for piece in calls] == [_PROBE] and "kveraser_key" in calls[0].arguments:
                return dialect if self._shows(dialect) else "the tags around calls are not in this model's replies"
        return f"the chat template of this model writes calls in a form that is none of {', '.join(d.name for d in DIALECTS)}"

    def _shows(self, dialect: Dialect) -> bool:
        """Whether a reply's text has the tags: special tokens are left out of it."""
        tags = dialect.opening + dialect.closing
        ids = self._tokenizer.encode(tags, add_special_tokens=False)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) == tags

    @property
    def dialect(self) -> Dialect:
        """How the model writes calls.

        Raises:
            ApiError: tools cannot be used with this template.
        """
        if isinstance(self._found, str):
            raise ApiError(400, f"tools are not served: {self._found}", code="tools_not_supported", param="tools")
        return self._found


def _common(left: str, right: str) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))


def _entry(message: ChatMessage) -> dict[str, Any]:
    """A message as templates take it."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    given = {
        "name": message.name,
        "tool_calls": calls or None,
        "tool_call_id": message.call_id,
        "reasoning_content": message.reasoning,
    }
    return {
        "role": message.role,
        **{name: value for name, value in given.items() if value is not None},
        "content": message.text,
    }
