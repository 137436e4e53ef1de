"""What a client is told of an edited context in place of what the server says: it knows nothing of the ids that stand for erased ones.

Knows: OpenAI's JSON, server-sent events. Does not know how the context was edited.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from kveraser.serving.events import event_line

_END = b"\n\n"


@dataclass(frozen=True)
class EditReport:
    """How a prompt got into an edited context: the object `kveraser` of a reply.

    Attributes:
        method: `kveraser` where something was erased for this request, else `prefix`.
        exact: whether the context equals a fresh prefill; an edited one does not.
        spans: runs that were taken out, in tokens of the conversation as it was.
        tokens_reused: tokens of the prompt whose states were there already.
        tokens_recomputed: tokens that are run for this request: to erase, and new ones.
        erase_seconds: that the erase took.
    """

    method: str
    exact: bool
    spans: tuple[tuple[int, int], ...]
    tokens_reused: int
    tokens_recomputed: int
    erase_seconds: float


@dataclass(frozen=True)
class Told:
    """What is put into replies.

    Attributes:
        prompt_tokens: of the prompt, as the client sent it.
    """

    report: EditReport
    prompt_tokens: int

    def whole(self, text: bytes) -> bytes:
        """A reply that is not streamed; as it came if it is no object of JSON, which tells nothing of the prompt."""
        with suppress(ValueError):
            body = json.loads(text)
            if isinstance(body, dict):
                return json.dumps(self._changed(body, last=True), ensure_ascii=False).encode()
        return text

    def event(self, event: bytes) -> bytes:
        """One event of a stream, without the empty line behind it; as it came where it tells nothing of the prompt."""
        if not event.startswith(b"data: {"):
            return event + _END
        try:
            body = json.loads(event[len(b"data: ") :])
        except ValueError:
            return event + _END
        choices = body.get("choices") or ()
        ends = any(choice.get("finish_reason") for choice in choices)
        if not (ends or body.get("usage")):
            return event + _END
        return event_line(self._changed(body, last=ends or not choices)).encode()

    def _changed(self, body: dict[str, Any], last: bool) -> dict[str, Any]:
        body.pop("kv_transfer_params", None)
        if usage := body.get("usage"):
            usage["prompt_tokens"] = self.prompt_tokens
            usage["total_tokens"] = self.prompt_tokens + usage.get("completion_tokens", 0)
            details = usage.get("prompt_tokens_details") or {}
            if details.get("cached_tokens") is not None:
                details["cached_tokens"] = self.report.tokens_reused
        return {**body, "kveraser": asdict(self.report)} if last else body


class Events:
    """Cuts a stream into its events."""

    def __init__(self) -> None:
        self.rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """The events that are complete with more data, without the empty lines between them."""
        *events, self.rest = (self.rest + data).replace(b"\r\n", b"\n").split(_END)
        return events


def begins(event: bytes) -> str:
    """What an event of a stream says of the reply's beginning: "nothing" yet (a role alone), "reply", "error" of the request, or
    "failure" of the server."""
    if not event.startswith(b"data:"):
        return "nothing"
    try:
        body = json.loads(event[len(b"data:") :])
    except ValueError:
        return "reply"
    if not isinstance(body, dict):
        return "reply"
    if "error" in body:
        error = body["error"]
        code = error.get("code") if isinstance(error, dict) else None
        return "error" if isinstance(code, int) and code < 500 else "failure"
    choices = body.get("choices") or [{}]
    deltas = [choice.get("delta") for choice in choices if isinstance(choice, dict)]
    starts = all(
        isinstance(delta, dict) and "role" in delta and not any(value for name, value in delta.items() if name != "role")
        for delta in deltas
    ) and not any(choice.get("finish_reason") for choice in choices)  # fmt: skip
    return "nothing" if starts else "reply"
