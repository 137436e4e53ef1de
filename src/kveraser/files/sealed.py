"""Files that only a key opens: a line of JSON that anybody can read, then parts that are encrypted and authenticated (AES-256-GCM).

Knows: ciphers. Does not know what the parts are, or where keys are kept.

Each file has a key of its own, made of the key and a salt, so that no nonce is ever used twice; parts are encrypted in pieces,
whose nonces are their numbers. The line has the salt and the lengths of the parts and is authenticated with every piece: nothing
can be altered, left out, or taken from another file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kveraser.errors import DamagedError
from kveraser.files.keys import Key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PIECE = 1 << 24
"""Bytes that are encrypted at once."""
_TAG = 16
_LONGEST_LINE = 1 << 16


def sealed(head: dict[str, Any], parts: Sequence[bytes], key: Key) -> Iterator[bytes]:
    """The bytes of a sealed file, in pieces.

    Args:
        head: JSON that anybody can read; `key`, `salt` and `parts` are added.
    """
    said = {**head, "key": key.name, "salt": secrets.token_hex(32), "parts": [len(part) for part in parts]}
    line = json.dumps(said, sort_keys=True).encode() + b"\n"
    cipher = _cipher(key, said["salt"])
    yield line
    for number, part in enumerate(parts):
        for index, at in enumerate(range(0, len(part), PIECE)):
            yield cipher.encrypt(_nonce(number, index), memoryview(part)[at : at + PIECE], line)


def head_of(file: Path) -> dict[str, Any]:
    """What a sealed file says to everybody.

    Raises:
        DamagedError: it says nothing of the kind.
    """
    with file.open("rb") as stream:
        return _head(stream.readline(_LONGEST_LINE))


def unsealed(file: Path, key: Key) -> list[bytes]:
    """The parts of a sealed file.

    Raises:
        DamagedError: it is truncated or altered, or was sealed with another key.
    """
    from cryptography.exceptions import InvalidTag

    with file.open("rb") as stream:
        line = stream.readline(_LONGEST_LINE)
        head = _head(line)
        cipher, parts, wanted = _cipher(key, head["salt"]), [], len(line)
        try:
            for number, length in enumerate(head["parts"]):
                part = BytesIO()
                for index, at in enumerate(range(0, length, PIECE)):
                    size = min(PIECE, length - at) + _TAG
                    wanted += size
                    part.write(cipher.decrypt(_nonce(number, index), stream.read(size), line))
                parts.append(part.getvalue())
            if stream.read(1):
                raise DamagedError(f"{file} is altered: it is longer than its {wanted} bytes")
        except InvalidTag as error:
            size = file.stat().st_size
            raise DamagedError(f"{file} is truncated or altered ({size} bytes, of which {wanted} were read)") from error
        return parts


def _head(line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
        if not (isinstance(head["key"], str) and isinstance(head["salt"], str) and isinstance(head["parts"], list)):
            raise ValueError("it has no key, salt and parts")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"its first line cannot be read: {error!r}") from error
    assert isinstance(head, dict)
    return head


def _cipher(key: Key, salt: str) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(hmac.new(key.secret, b"kveraser sealed file" + salt.encode(), hashlib.sha256).digest())


def _nonce(part: int, piece: int) -> bytes:
    return struct.pack(">IQ", part, piece)
