"""How models write calls of tools. One file each, and a line in `DIALECTS`.

Knows: which dialects there are. Does not know which a model speaks: `template` finds out.
"""

from __future__ import annotations

from kveraser.serving.chat.dialects.base import Dialect, RawCall
from kveraser.serving.chat.dialects.hermes import Hermes

DIALECTS: tuple[Dialect, ...] = (Hermes(),)
"""All dialects, in the order in which they are tried."""

__all__ = ["DIALECTS", "Dialect", "RawCall"]
