"""A vLLM server seen from outside: completions of token ids, with what the connector says and is told.

Knows: HTTP and JSON, by the standard library. Does not know about text, spans or erasing.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any

from kveraser.engines.vllm.protocol import KEY, Demand, reading
from kveraser.errors import EngineError


@dataclass(frozen=True)
class Completion:
    """What a server answered.

    Attributes:
        ids: the new token ids, the end token included when it was reached.
        text: of them, without special tokens.
        logprobs: of each new token, when asked for.
        said: what the connector answered.
        cached: prompt tokens that were not computed, when the server tells.
    """

    ids: list[int]
    text: str
    logprobs: list[float] | None
    said: dict[str, Any]
    cached: int | None = None


def client_id(api_key: str | None = None) -> str:
    """Who asks: one for each key, machine and user, so that it is the same after a restart; tells nothing about them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = ""
    return hashlib.sha256(repr((platform.node(), user, api_key)).encode()).hexdigest()[:32]


class VLLMClient:
    """One server.

    Args:
        base_url: "http://host:port", with or without "/v1".
        api_key: when the server wants one.
        timeout: seconds per request.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        if not self.base_url.startswith(("http://", "https://")):
            raise EngineError(f"a server's address begins with http:// or https://, got {base_url!r}")
        self._api_key, self._timeout = api_key, timeout
        self._client = client_id(api_key)

    def models(self) -> list[dict[str, Any]]:
        """The models and adapters that the server offers; each has an `id`."""
        cards = self.call("/v1/models")
        with reading(f"{self.base_url}/v1/models"):
            return [{**card, "id": str(card["id"])} for card in cards["data"]]

    def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text, by the server's tokenizer, without special tokens around it."""
        answer = self.call("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
        with reading(f"{self.base_url}/tokenize"):
            return list(answer["tokens"])

    def complete(
        self,
        model: str,
        ids: Sequence[int],
        *,
        max_tokens: int,
        demand: Demand | None = None,
        salt: str | None = None,
        **options: Any,
    ) -> Completion:
        """Continue token ids.

        Args:
            options: further fields of the request (temperature, logprobs, stop, ...).

        Raises:
            EngineError: the server cannot be reached, refuses, or could not load what was demanded.
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(ids),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "return_token_ids": True,
            **options,
        }
        if demand is not None:
            body["kv_transfer_params"] = replace(demand, client=self._client).params()
        if salt is not None:
            body["cache_salt"] = salt
        data = self.call("/v1/completions", body)
        with reading(f"{self.base_url}/v1/completions"):
            return _completion(data)

    def forget(self, model: str, entries: Sequence[str]) -> None:
        """Have entries dropped that are not needed any more; where that fails, they are dropped sooner or later, to make room."""
        if entries:
            with suppress(EngineError):
                self.complete(model, [0], max_tokens=1, demand=Demand(drop=tuple(entries)))

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request; the response's JSON.

        Raises:
            EngineError: it cannot be reached, or answers with an error.
        """
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise EngineError(f"{self.base_url}{path} answered {error.code}: {_message(error)}") from error
        except (OSError, ValueError, HTTPException) as error:
            raise EngineError(f"{self.base_url}{path} cannot be reached: {error}") from error


def _completion(data: dict[str, Any]) -> Completion:
    choice = data["choices"][0]
    if choice.get("finish_reason") == "error":
        raise EngineError("the server could not finish the request; its log says why")
    said = dict((data.get("kv_transfer_params") or {}).get(KEY) or {})
    if "error" in said:
        raise EngineError(f"the server refuses: {said['error']}")
    details = (data.get("usage") or {}).get("prompt_tokens_details") or {}
    return Completion(
        ids=list(choice.get("token_ids") or ()),
        text=choice["text"],
        logprobs=(choice.get("logprobs") or {}).get("token_logprobs"),
        said=said,
        cached=details.get("cached_tokens"),
    )


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read().decode(errors="replace")
    except (OSError, HTTPException):  # it breaks off
        return error.reason
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
