"""Calls as Hermes and Qwen write them: `<tool_call>{"name": "look", "arguments": {"city": "Oslo"}}</tool_call>`.

Small models forget a tag, or write another one. So a call ends with its JSON object, and a reply that begins with one that has
a `name` may be a call as well.

Knows: this form. Does not know which tools there are.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from kveraser.errors import BadCallError
from kveraser.serving.chat.dialects.base import Dialect, RawCall

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

    def split(self, text: str, last: bool) -> tuple[str, str] | None:
        end = _object_end(text)
        if end is not None:
            behind = text[end:].lstrip()
            if behind.startswith(self.closing):
                return text[:end], behind[len(self.closing) :]
            return None if not last and self.closing.startswith(behind) else (text[:end], text[end:])
        at = -1
        while (at := text.find(self.closing, at + 1)) >= 0:
            if '"' not in _QUOTED.sub("", text[:at]):  # not within quotes
                return text[:at], text[at + len(self.closing) :]
        return None

    def is_bare(self, text: str, last: bool) -> bool | None:
        if not text.startswith("{"):
            return None if not text and not last else False
        key, begun = '"name"', text[1:].lstrip()
        return begun.startswith(key) or (None if not last and key.startswith(begun) else False)


def _object_end(text: str) -> int | None:
    """Where the JSON object ends that a text begins with, if it does."""
    start = len(text) - len(text.lstrip())
    if not text.startswith("{", start):
        return None
    try:
        return int(_DECODER.raw_decode(text, start)[1])
    except (ValueError, RecursionError):
        return None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
