"""What a dialect has to say: where a call begins and ends, and what it is.

Knows: text. Does not know about tools, templates or replies. An author of a dialect needs nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class RawCall:
    """A call as it was written, whether or not there is such a tool."""

    name: str
    arguments: dict[str, Any]


class Dialect(ABC):
    """A form of calls: each behind an `opening` text, and before a `closing` one.

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

    def split(self, text: str, last: bool) -> tuple[str, str] | None:
        """What stands between the two texts, and what is behind; None where the end is not there.

        Args:
            text: of a reply, behind an opening.
            last: whether there is no more of the reply.
        """
        body, found, behind = text.partition(self.closing)
        return (body, behind) if found else None

    def is_bare(self, text: str, last: bool) -> bool | None:
        """Whether a reply begins with a call that has no opening, as small models write them; None where that cannot be told yet.

        Args:
            text: of a reply; it begins with no blank.
            last: whether there is no more of the reply.
        """
        return False
