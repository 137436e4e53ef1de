"""What runs in the user's process: `VLLMSession`, several at once, and below them the erase as requests, the passes it takes, HTTP.

Knows: token ids, text, chat, HTTP. Does not import vLLM, hold states, or know how the engine keeps them.
"""

from __future__ import annotations

from kveraser.engines.vllm.client.http import Completion, VLLMClient
from kveraser.engines.vllm.client.session import VLLMReceipt, VLLMSession
from kveraser.engines.vllm.client.together import erase_together

__all__ = ["Completion", "VLLMClient", "VLLMReceipt", "VLLMSession", "erase_together"]
