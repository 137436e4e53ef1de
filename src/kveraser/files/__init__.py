"""Files: where kveraser keeps what it can rebuild, writing whole or not at all, and writing what can be made unreadable.

Knows: folders, bytes, ciphers. Does not know what is in the files.

    disk      every change to a file, one small step each      writing   whole or not at all; overwriting
    keys      a key file, whose keys are overwritten in place   sealed    files that only such a key opens
    locks     a file that one holds at a time                  checked   JSON with format and checksum around it

How a file tells that it is whole:

    enclosed (`checked`)              cards of a server's contexts, manifests of the vLLM store, measured costs, sessions of format 1
    sealed, authenticated (`sealed`)  sessions; a checksum would tell less, and something of what it is made from
    checksum in the name or manifest  states in the vLLM store, converted weights, states of sessions of format 1: large, and other programs
                                      read them as they are; a manifest that lists checksums can only be damaged so that it does not fit
    checksum in metadata              `readers.safetensors`, exported adapters: it stands where their formats have room for text
    checksum in a record of bytes     the key file, which is overwritten in place, page by page
    zip's own checksums               checkpoints of training, which are PyTorch's (it does not look at them: who loads one does)
    none                              `kveraser.json`, PEFT's files, results and logs: people edit them, and other programs write them
"""

from __future__ import annotations

import os
from pathlib import Path

from kveraser.files.checked import digest, digest_json, enclosed, opened
from kveraser.files.writing import appearing_whole, write_atomically

__all__ = [
    "appearing_whole",
    "cache_folder",
    "digest",
    "digest_json",
    "enclosed",
    "opened",
    "write_atomically",
]


def cache_folder() -> Path:
    """`$KVERASER_CACHE`, else `kveraser` in the user's cache folder."""
    if override := os.environ.get("KVERASER_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "kveraser"
