"""The tokenizer inside a GGUF file, with the few methods of a transformers tokenizer that contexts use.

Knows: llama.cpp's vocabularies. Does not know about models or contexts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from kveraser.engines.llama_cpp.library import lib
from kveraser.errors import EngineError


class LlamaCppTokenizer:
    """Text to ids and back.

    Args:
        vocab: llama.cpp's vocabulary; belongs to the model, which must outlive this.

    Raises:
        EngineError: the file carries no tokenizer.
    """

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        if lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise EngineError("the GGUF file carries no tokenizer; convert the model with its tokenizer")

    def __len__(self) -> int:
        return int(lib.llama_vocab_n_tokens(self._vocab))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in the text become these tokens."""
        data = text.encode()
        size = len(data) + 16
        while True:
            ids = (ctypes.c_int32 * size)()
            count = int(lib.llama_tokenize(self._vocab, data, len(data), ids, size, add_special_tokens, True))
            if count >= 0:
                return list(ids[:count])
            size = -count

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,  # nothing is ever tidied up
    ) -> str:
        """The text of ids; characters that are cut at the borders become replacement characters."""
        kept = [i for i in ids if not (skip_special_tokens and lib.llama_vocab_is_control(self._vocab, i))]
        tokens = (ctypes.c_int32 * max(len(kept), 1))(*kept)
        size = 16 * len(kept) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = int(lib.llama_detokenize(self._vocab, tokens, len(kept), buffer, size, False, True))
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

    def ends(self, token: int) -> bool:
        """Whether a token ends a text or a turn."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))
