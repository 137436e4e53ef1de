"""What a request says, as far as the proxy has to know: its body is otherwise passed on as it came.

Knows: names of fields of OpenAI's and vLLM's JSON. Does not know about conversations, servers or HTTP.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kveraser.errors import ApiError
from kveraser.serving.contexts.reuse import Policy
from kveraser.serving.options import Options

_REFUSED = {
    "kv_transfer_params": "edits and transfers of states are the proxy's business; a session talks to the vLLM server itself",
    "previous_response_id": "replies that are kept on one server cannot be found behind a proxy; send the conversation",
    "background": "replies that are kept on one server cannot be found behind a proxy",
}
_EXTRA = "vllm_xargs"
"""A field whose own fields vLLM puts where it puts some of these."""
_LEFT_ALONE = ("cache_salt", "echo", "prompt_logprobs", "return_token_ids", "return_prompt_text", "return_token_offsets",
               "truncate_prompt_tokens", "use_beam_search", "routed_experts_prompt_start")  # fmt: skip
"""Fields that show the prompt, change it, or keep its blocks apart: with them, nothing is edited."""


@dataclass(frozen=True)
class Asked:
    """A chat completion.

    Attributes:
        raw: its body, to be passed on when nothing is edited.
        body: the same, without what was for the proxy alone.
        follows: whether its conversation is followed, and may be edited.
    """

    raw: bytes
    body: dict[str, Any]
    policy: Policy | None
    follows: bool

    @property
    def model(self) -> str:
        """The model that is asked for."""
        return str(self.body.get("model", ""))

    @property
    def stream(self) -> bool:
        """Whether the reply is to come in pieces."""
        return bool(self.body.get("stream"))

    @property
    def max_tokens(self) -> int:
        """Tokens that the reply may have; 1 where the server is to decide."""
        named = (self.body.get(name) for name in ("max_completion_tokens", "max_tokens"))
        return next((count for count in named if isinstance(count, int) and count > 0), 1)

    def with_prompt(self, prompt: list[int], extra: Mapping[str, Any]) -> bytes:
        """The body that has vLLM answer other ids than it would make of the messages.

        Args:
            extra: what a session's `request` adds to a body.
        """
        transfer = {**extra["kv_transfer_params"], "prompt_token_ids": prompt}
        return json.dumps({**self.body, **extra, "kv_transfer_params": transfer}).encode()


def read_body(raw: bytes) -> dict[str, Any]:
    """A body as JSON; nothing is asked for in an empty one.

    Raises:
        ApiError: it asks for what cannot be behind a proxy, or is not certainly read by others as it is read here: it is passed on as it came.
    """
    if not raw:
        return {}
    body: Any = None
    with suppress(ValueError, RecursionError):
        body = json.loads(str(raw, "utf-8"), object_pairs_hook=_fields)
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object in UTF-8, or is nested too deeply")
    extra = body.get(_EXTRA)
    for name, reason in _REFUSED.items():
        if _says(body.get(name)) or (isinstance(extra, dict) and name in extra):
            raise ApiError(400, f"{name}: {reason}", code="not_passed_on", param=name)
    return body


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose fields everybody reads in the same way."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ApiError(400, f"an object has the field {twice[:100]!r} twice; which one counts is not certain")
    return fields


def read_chat(raw: bytes) -> Asked:
    """A chat completion.

    Raises:
        ApiError: as `read_body`, or a field `kveraser` that is not right, or asks for more than a policy.
    """
    body = read_body(raw)
    policy = None
    if "kveraser" in body:
        try:
            wishes = Options.model_validate(body.pop("kveraser") or {})
        except ValidationError as error:
            raise ApiError(400, f"kveraser: {error.errors()[0]['msg']}", param="kveraser") from None
        policy = wishes.policy
        for name, value in wishes.model_dump(exclude={"policy"}, exclude_none=True).items():
            if value != []:
                raise ApiError(
                    400, f"kveraser.{name}: `kveraser serve` does this, a proxy only has a policy", param="kveraser"
                )
        raw = json.dumps(body).encode()
    shown = any(_says(body.get(name)) for name in _LEFT_ALONE)
    one = body.get("n") in (None, 1)
    follows = one and not shown and isinstance(body.get("model"), str) and isinstance(body.get("messages"), list)
    return Asked(raw, body, policy, follows)


def _says(value: Any) -> bool:
    """Whether a field's value is more than leaving it out."""
    return value is not None and value is not False and value != ""
