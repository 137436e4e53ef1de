"""The tokenizer inside a GGUF file, with the few methods of a transformers tokenizer that contexts use.

Knows: llama.cpp's vocabularies. Does not know about models or contexts.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from kveraser.engines.llama_cpp.library import lib
from kveraser.errors import EngineError


class LlamaCppTokenizer:
    """Text to ids and back.

    Args:
        vocab: llama.cpp's vocabulary; belongs to the model, which must outlive this.
        chat_template: of the file, if it has one.

    Raises:
        EngineError: the file carries no tokenizer.
    """

    is_fast = True
    """It gives offsets."""

    def __init__(self, vocab: Any, chat_template: bytes | None = None) -> None:
        self._vocab = vocab
        self.chat_template = None if chat_template is None else chat_template.decode()
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

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[Any]]:
        """`input_ids`, and as `offset_mapping` the characters that each token begins and ends with."""
        ids, data = self.encode(text, add_special_tokens), text.encode()
        pieces = [self._piece(token) for token in ids]
        if not b"".join(pieces).endswith(data):
            raise EngineError("this tokenizer changes the text, so where its tokens begin cannot be told")
        before = sum(map(len, pieces)) - len(data)
        bounds = [max(at - before, 0) for at in accumulate(map(len, pieces), initial=0)]
        starts = [*accumulate((len(c.encode()) for c in text), initial=0)]  # of every character
        offsets = [(bisect_right(starts, a) - 1, bisect_left(starts, b)) for a, b in pairwise(bounds)]
        return {"input_ids": ids, "offset_mapping": [(a, b) if b > a else (0, 0) for a, b in offsets]}

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        count = int(lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True))
        return buffer.raw[:count]

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False, **_: Any) -> str:
        """A conversation as text, by the template in the file."""
        ends = {"bos_token": lib.llama_vocab_bos(self._vocab), "eos_token": lib.llama_vocab_eos(self._vocab)}
        special = {name: self._piece(token).decode() if token >= 0 else "" for name, token in ends.items()}
        rendered, _spans = render_jinja_template(
            [messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, **special
        )
        return str(rendered[0])

    def ends(self, token: int) -> bool:
        """Whether a token ends a text or a turn."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))
