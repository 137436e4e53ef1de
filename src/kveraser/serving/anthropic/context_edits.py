"""`context_management`: what the server clears before the model reads a conversation.

Knows: which calls and which thinking are old, how many tokens clearing them saves. Does not know how something is erased: what is
cleared is missing from the prompt, and is taken out of the cached conversation like all else that a request leaves out.

Clients keep sending the whole conversation, so the same is cleared again each time, and a little more as it grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kveraser.serving.anthropic.protocol import ClearThinking, ClearToolUses, ContextManagement, ThinkingTurns
from kveraser.serving.chat.clearing import Cleared
from kveraser.serving.chat.messages import ChatMessage
from kveraser.serving.chat.rendering import Chat, ChatRenderer, Rendered


@dataclass(frozen=True)
class Edited:
    """A conversation as it is read: `applied` are Anthropic's `applied_edits`, `before` its tokens if nothing were cleared."""

    rendered: Rendered
    applied: tuple[dict[str, Any], ...]
    before: int


def edited(renderer: ChatRenderer, chat: Chat, management: ContextManagement | None) -> Edited:
    """Clear what is asked for, edit by edit.

    Raises:
        as `ChatRenderer.render` does.
    """
    made = renderer.render(chat)
    before, applied = len(made.ids), list[dict[str, Any]]()
    for edit in (management and management.edits) or ():
        if isinstance(edit, ClearThinking):
            old = old_thinking(chat.messages, edit)
            messages = tuple(
                replace(each, reasoning=None) if at in old else each for at, each in enumerate(chat.messages)
            )
            changed, count, counted = replace(chat, messages=messages), len(old), "cleared_thinking_turns"
        else:
            cleared, count = old_tool_uses(chat.messages, edit, before)
            results, inputs = chat.cleared.results | cleared.results, chat.cleared.inputs | cleared.inputs
            changed, counted = replace(chat, cleared=Cleared(results, inputs)), "cleared_tool_uses"
        if not count:
            continue
        shorter = renderer.render(changed)
        saved = len(made.ids) - len(shorter.ids)
        if isinstance(edit, ClearToolUses) and edit.clear_at_least and saved < edit.clear_at_least.value:
            continue
        chat, made = changed, shorter
        applied.append({"type": edit.type, counted: count, "cleared_input_tokens": saved})
    return Edited(made, tuple(applied), before)


def old_thinking(messages: Sequence[ChatMessage], edit: ClearThinking) -> frozenset[int]:
    """The messages whose thinking is cleared."""
    if not isinstance(edit.keep, ThinkingTurns):
        return frozenset()
    thought = [index for index, message in enumerate(messages) if message.reasoning]
    return frozenset(thought[: -edit.keep.value])


def old_tool_uses(messages: Sequence[ChatMessage], edit: ClearToolUses, tokens: int) -> tuple[Cleared, int]:
    """What of calls and results is cleared, and of how many calls; nothing where nothing triggers it.

    Args:
        tokens: of the prompt if nothing were cleared.
    """
    results = {message.call_id: index for index, message in enumerate(messages) if message.call_id is not None}
    uses = [
        (index, number, call.name, results[call.id])
        for index, message in enumerate(messages)
        for number, call in enumerate(message.calls)
        if call.id in results
    ]
    measured = tokens if edit.trigger.type == "input_tokens" else len(uses)
    if measured <= edit.trigger.value:
        return Cleared(), 0
    old = uses[: len(uses) - edit.keep.value] if edit.keep.value < len(uses) else []
    old = [use for use in old if use[2] not in (edit.exclude_tools or ())]
    named = edit.clear_tool_inputs
    inputs = {use[:2] for use in old if named is True or (isinstance(named, list) and use[2] in named)}
    return Cleared(frozenset(use[3] for use in old), frozenset(inputs)), len(old)
