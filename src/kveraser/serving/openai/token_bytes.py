"""The bytes of single tokens, also of those that hold a part of a character only.

Knows: how byte-level and SentencePiece tokenizers write bytes. Does not know about replies.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Tells the bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self._letters = _byte_letters() if "ByteLevel" in decoder else {}
        self._blank = "▁" if "▁" in decoder or "Metaspace" in decoder else None

    def of(self, token: int) -> bytes:
        """The bytes of a token."""
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str) or token in self._tokenizer.added_tokens_decoder:
            return text.encode()
        if found := _BYTE.fullmatch(piece):
            return bytes.fromhex(found[1])
        if self._letters and all(letter in self._letters for letter in piece):
            return bytes(self._letters[letter] for letter in piece)
        return piece.replace(self._blank, " ").encode() if self._blank else text.encode()


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level tokenizers (as in GPT-2): itself, where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {**{chr(byte): byte for byte in seen}, **{chr(256 + number): byte for number, byte in enumerate(others)}}
