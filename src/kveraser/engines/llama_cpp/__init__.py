"""Erasing from llama.cpp's KV cache, on its public C API.

`library` is the C library behind `llama-cpp-python`, `model` a loaded GGUF file, `cells` its KV cache as numbered cells of
sequences, `passes` what is done to them, `backend` and `running` that as a backend, `context` the context over it.

Knows: llama.cpp. Does not know about transformers' caches, or how a context keeps its books.
"""

from kveraser.engines.llama_cpp.context import METHODS, LlamaCppContext
from kveraser.engines.llama_cpp.model import LlamaCppModel

__all__ = ["METHODS", "LlamaCppContext", "LlamaCppModel"]
