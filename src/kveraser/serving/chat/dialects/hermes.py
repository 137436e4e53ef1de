"""Calls as Hermes and Qwen write them: `<tool_call>{"name": "look", "arguments": {"city": "Oslo"}}</tool_call>`.

Knows: this form. Does not know which tools there are.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from kveraser.serving.chat.dialects.base import BadCallError, Dialect, RawCall

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class Hermes(Dialect):
    """A JSON object with `name` and `arguments` between tags."""

    name = "hermes"
    opening, closing = "<tool_call>", "</tool_call>"

    def read(self, body: str) -> RawCall:
        try:
            value = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise BadCallError("the call is no JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise BadCallError("the call names no tool")
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            raise BadCallError("the arguments are no JSON object")
        if extra := sorted(set(value) - {"name", "arguments"}):
            raise BadCallError(f"the call has more than a name and arguments: {', '.join(extra)}")
        return RawCall(value["name"], arguments)

    def begin(self, name: str | None) -> str:
        head = f'{self.opening}\n{{"name":'
        return head if name is None else f'{head} {json.dumps(name, ensure_ascii=False)}, "arguments":'

    def is_inside(self, body: str) -> bool:
        return '"' in _QUOTED.sub("", body)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")
