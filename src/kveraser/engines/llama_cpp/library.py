"""The C library that the `llama-cpp-python` wheel carries.

Knows: that package's low-level API, and which version this was written for. Does not know what is done with it.

Structs go to C by value: with another version they would be read as something else. So the version is pinned, and the
library's own defaults are compared with what this version has before anything is trusted.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kveraser.errors import EngineError

VERSION = "0.3.36"
_INSTALL = f"pip install llama-cpp-python=={VERSION} (it compiles llama.cpp: cmake and a C++ compiler are needed)"
_WARNING = 3


def _load() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise EngineError(f"llama-cpp-python is not installed ({error}); run: {_INSTALL}") from error
    except (OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python's library cannot be loaded ({error}); run again: {_INSTALL}") from error
    if llama_cpp.__version__ != VERSION:
        raise EngineError(
            f"llama-cpp-python {llama_cpp.__version__} is installed, {VERSION} is needed; run: {_INSTALL}"
        )
    return llama_cpp


lib = _load()


def check_defaults() -> None:
    """Compare the library's default parameters with what this version is known to have.

    Raises:
        EngineError: they differ, so the library is another one than its Python package says.
    """
    context, model = lib.llama_context_default_params(), lib.llama_model_default_params()
    found = {
        "n_ctx": context.n_ctx, "n_batch": context.n_batch, "n_ubatch": context.n_ubatch,
        "n_seq_max": context.n_seq_max, "type_k": context.type_k, "type_v": context.type_v,
        "flash_attn_type": context.flash_attn_type, "embeddings": bool(context.embeddings),
        "offload_kqv": bool(context.offload_kqv), "no_perf": bool(context.no_perf),
        "op_offload": bool(context.op_offload), "swa_full": bool(context.swa_full),
        "kv_unified": bool(context.kv_unified), "n_samplers": context.n_samplers,
        "n_gpu_layers": model.n_gpu_layers, "use_extra_bufts": bool(model.use_extra_bufts),
        "no_alloc": bool(model.no_alloc), "vocab_only": bool(model.vocab_only),
    }  # fmt: skip
    wanted = {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "type_k": 1, "type_v": 1, "flash_attn_type": -1,
        "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
        "kv_unified": False, "n_samplers": 0, "n_gpu_layers": -1, "use_extra_bufts": True, "no_alloc": False,
        "vocab_only": False,
    }  # fmt: skip
    wrong = [f"{name} is {found[name]}, not {value}" for name, value in wanted.items() if found[name] != value]
    if wrong:
        raise EngineError(f"llama.cpp's library is not that of llama-cpp-python {VERSION}: {'; '.join(wrong)}")


class _Messages(threading.local):
    """Where this thread's messages go; None passes them on."""

    collected: list[str] | None = None


_messages = _Messages()
_before, _data = lib.llama_log_callback(), ctypes.c_void_p()
lib.llama_log_get(ctypes.byref(_before), ctypes.byref(_data))


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _receive(level: int, text: bytes, _: Any) -> None:
    """Takes what llama.cpp says. It has one receiver per process, so this one stays, and passes on what others caused."""
    if _messages.collected is None:
        if _before:
            _before(level, text, _data)
    elif level >= _WARNING and text.strip():
        _messages.collected.append(text.decode("utf-8", "replace").strip())


lib.llama_log_set(_receive, ctypes.c_void_p())


@contextmanager
def captured() -> Iterator[list[str]]:
    """Collect llama.cpp's warnings and errors, and keep all it says in this thread off the terminal, while the block runs."""
    outer, _messages.collected = _messages.collected, []
    try:
        yield _messages.collected
    finally:
        _messages.collected = outer


def said(messages: list[str]) -> str:
    """The last of the collected messages, for an error."""
    return " / ".join(messages[-3:]) or "llama.cpp gives no reason"


def _ggml(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the tensor library, which the Python package does not wrap."""
    return ctypes.CFUNCTYPE(result, *arguments)((name, lib.llama_cpp._lib))


_get_name = _ggml("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_get_operation = _ggml("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p)
_get_bytes = _ggml("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_get_data = _ggml("ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


def tensor_name(tensor: Any) -> str:
    """The name of a tensor that a listener of a forward is shown."""
    return str(_get_name(tensor).decode("utf-8", "replace"))


def tensor_operation(tensor: Any) -> str:
    """What makes it, such as "ROPE"."""
    return str(_get_operation(tensor).decode())


def tensor_data(tensor: Any) -> NDArray[np.float32]:
    """A copy of a whole tensor of float32 numbers, flat."""
    found = np.empty(int(_get_bytes(tensor)) // 4, np.float32)
    _get_data(tensor, found.ctypes.data, 0, found.nbytes)
    return found


check_defaults()
with captured():
    lib.llama_backend_init()
