"""What a dialect has to say: where a call begins and ends, and what it is.

Knows: text. Does not know about tools, templates or replies. An author of a dialect needs nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from kveraser.serving.chat.tools import BadCallError


@dataclass(frozen=True)
class RawCall:
    """A call as it was written, whether or not there is such a tool."""

    name: str
    arguments: dict[str, Any]


class Dialect(ABC):
    """A form of calls: each between an `opening` and a `closing` text, and nothing else of a reply begins like them.

    Attributes:
        name: what the form is called.
    """

    name: ClassVar[str]
    opening: ClassVar[str]
    closing: ClassVar[str]

    @abstractmethod
    def read(self, body: str) -> RawCall:
        """The call that stands between the two texts.

        Raises:
            BadCallError: it is none.
        """

    @abstractmethod
    def begin(self, name: str | None) -> str:
        """The beginning of a call of a tool (None: of any); no blank ends it, since models begin their words with one."""

    def is_inside(self, body: str) -> bool:
        """Whether a closing text behind this much of a call is a part of it, as within quotes."""
        return False


__all__ = ["BadCallError", "Dialect", "RawCall"]
