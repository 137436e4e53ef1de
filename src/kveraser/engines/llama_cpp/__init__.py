"""Erasing from llama.cpp's KV cache, on its public C API.

`library` is the C library behind `llama-cpp-python`, `model` a loaded GGUF file, `cells` its KV cache as numbered cells of
sequences, `passes` and `kept` what is done to them, `context` the verbs of `ErasableContext` on top.
"""

from kveraser.engines.llama_cpp.context import LlamaCppContext, LlamaCppReceipt
from kveraser.engines.llama_cpp.erasing import METHODS
from kveraser.engines.llama_cpp.model import LlamaCppModel

__all__ = ["METHODS", "LlamaCppContext", "LlamaCppModel", "LlamaCppReceipt"]
