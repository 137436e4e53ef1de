"""From the body of a request to the conversation that all APIs have in common.

Knows: Anthropic's messages and blocks. Does not know about templates or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kveraser.errors import ApiError
from kveraser.serving.anthropic.blocks import TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock, text_of
from kveraser.serving.anthropic.protocol import AssistantMessage, CountRequest, UserMessage
from kveraser.serving.chat.messages import Call, ChatMessage
from kveraser.serving.chat.offering import offered
from kveraser.serving.chat.rendering import Chat


def chat_of(body: CountRequest) -> Chat:
    """The conversation of a body. A last message of the assistant is the beginning of the reply.

    Raises:
        ApiError: something in it does not fit together.
    """
    messages: list[ChatMessage] = []
    called: set[str] = set()
    system = text_of(body.system)
    if system:
        messages.append(ChatMessage("system", system))
    for index, message in enumerate(body.messages):
        place = f"messages[{index}]"
        if isinstance(message, UserMessage):
            messages += _said(message, place, called)
        elif isinstance(message, AssistantMessage):
            messages.append(_replied(message))
            called |= {call.id for call in messages[-1].calls}
        else:
            messages.append(ChatMessage("system", text_of(message.content)))
    chat = Chat(
        tuple(messages),
        offered([tool.tool() for tool in body.tools or ()], body.choice, "input_schema"),
        think=body.thinking is not None and body.thinking.type != "disabled",
        tells_thinking=True,
    )
    return _begun(chat, place) if messages[-1].role == "assistant" else chat


def _said(message: UserMessage, place: str, called: set[str]) -> list[ChatMessage]:
    """What a user's message holds, in its order: results of what was `called`, and texts."""
    if isinstance(message.content, str):
        said = [ChatMessage("user", message.content)]
    else:
        said = _blocks(message.content, place, called)
    if any(each.role == "user" and not each.text for each in said):
        raise ApiError(400, f"{place}.content: a user's message needs text", param=f"{place}.content")
    return said


def _blocks(blocks: Sequence[TextBlock | ToolResultBlock], place: str, called: set[str]) -> list[ChatMessage]:
    said: list[ChatMessage] = []
    for number, block in enumerate(blocks):
        last = said[-1] if said else None
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in called:
                at = f"{place}.content[{number}].tool_use_id"
                raise ApiError(400, f"{at}: there is no call {block.tool_use_id!r} before this result", param=at)
            said.append(ChatMessage("tool", _result(block), call_id=block.tool_use_id))
        elif last is not None and last.role == "user":
            said[-1] = replace(last, text=f"{last.text}\n{block.text}")
        else:
            said.append(ChatMessage("user", block.text))
    return said


def _result(block: ToolResultBlock) -> str:
    """A result as the model reads it: one that is an error says so."""
    text = text_of(block.content)
    if not block.is_error or text.lower().startswith("error"):
        return text
    return f"Error: {text}" if text else "Error"


def _replied(message: AssistantMessage) -> ChatMessage:
    if isinstance(message.content, str):
        return ChatMessage("assistant", message.content)
    blocks = message.content
    return ChatMessage(
        "assistant",
        text_of([block for block in blocks if isinstance(block, TextBlock)]),
        calls=tuple(Call(block.id, block.name, block.input) for block in blocks if isinstance(block, ToolUseBlock)),
        reasoning="\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)) or None,
    )


def _begun(chat: Chat, place: str) -> Chat:
    """The conversation without its last message, which is the beginning of the reply."""
    last = chat.messages[-1]
    if last.calls:
        raise ApiError(400, f"{place}: a call needs its result in the next message", param=place)
    if last.text != last.text.rstrip():
        raise ApiError(400, f"{place}: the beginning of a reply cannot end with blanks", param=place)
    if len(chat.messages) == 1:
        raise ApiError(400, "messages: there is nothing to reply to", param="messages")
    return replace(chat, messages=chat.messages[:-1], begun=last.text)
