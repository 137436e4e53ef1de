"""From a conversation to the ids of its prompt, and how its reply begins and is read. It may take a while: not for the event loop.

Knows: the template, the tokenizer, what tools ask of a reply. Does not know about any API's JSON or what becomes of the ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kveraser.errors import ApiError, ContextLengthError, UnknownCallError
from kveraser.serving.chat.clearing import NOTHING, Cleared, cleared_ids
from kveraser.serving.chat.messages import ChatMessage, with_tool_names
from kveraser.serving.chat.reading import PlainReader, ReplyReader
from kveraser.serving.chat.template import ChatTemplate
from kveraser.serving.chat.tools import NO_TOOLS, Toolset
from kveraser.serving.service import Service

Reader = PlainReader | ReplyReader


@dataclass(frozen=True)
class Chat:
    """A conversation that waits for a reply.

    Attributes:
        think: whether the model is to think first; None leaves that to the template.
        tells_thinking: whether what it thinks is told apart from its reply.
        begun: the reply's beginning, which the client wrote and is not told again.
        cleared: what of the messages is not shown to the model any more.
    """

    messages: tuple[ChatMessage, ...]
    tools: Toolset = NO_TOOLS
    think: bool | None = None
    tells_thinking: bool = False
    begun: str = ""
    cleared: Cleared = NOTHING


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it; the reply begins with `told`, which is a part of the ids already."""

    ids: tuple[int, ...]
    told: str
    reader: Callable[[], Reader]


class ChatRenderer:
    """Renders conversations for one model."""

    def __init__(self, service: Service) -> None:
        self._tokenizer, self._limits = service.tokenizer, service.limits
        self.template = ChatTemplate(service.tokenizer)

    def render(self, chat: Chat) -> Rendered:
        """The ids of a conversation, and how its reply is to be read.

        Raises:
            ApiError: the template refuses it, or has no tools; a result of no call.
            ContextLengthError: it is longer than anything that can be read.
        """
        try:
            messages = with_tool_names(chat.messages)
        except UnknownCallError as error:
            raise ApiError(400, str(error), param=f"messages[{error.index}]") from None
        tools, template = chat.tools, self.template
        dialect = template.dialect if tools.tools else None
        shown = [tool.shown for tool in tools.tools]
        self._check(messages, shown)
        thinking = template.thinking if chat.tells_thinking or dialect else None

        def text_of(messages: object) -> str:
            return template.render(messages, shown, thinking=chat.think)  # type: ignore[arg-type]

        text = text_of(messages)
        inside = thinking is not None and text.rstrip().endswith(thinking[0])
        told = ""
        if tools.forced:
            assert dialect is not None
            if chat.begun:
                raise ApiError(
                    400, "a reply that is begun already cannot be made to begin with a call", param="messages"
                )
            told = (f"{thinking[1]}\n\n" if thinking and inside else "") + dialect.begin(tools.only)
        begun = chat.begun + told
        if chat.cleared:
            ids = cleared_ids(self._tokenizer, messages, chat.cleared, lambda messages: text_of(messages) + begun)
        else:
            ids = tuple(self._tokenizer.encode(text + begun, add_special_tokens=False))
        calls = dialect if tools.choice.mode != "none" else None
        if calls is None and not chat.tells_thinking:
            return Rendered(ids, told, PlainReader)
        told_thinking = thinking if chat.tells_thinking and not chat.begun else None
        return Rendered(ids, told, lambda: ReplyReader(calls, tools, told_thinking, inside))

    def _check(self, messages: tuple[ChatMessage, ...], shown: object) -> None:
        """Refuse what is too long before a template and a tokenizer are busy with it."""
        try:
            self._limits.check_text(
                *(each.text for each in messages),
                *(each.reasoning or "" for each in messages),
                *(f"{call.name}{call.arguments}" for each in messages for call in each.calls),
                str(shown),
            )
        except ContextLengthError as error:
            error.param = "messages"
            raise
