"""Who can reach a server on an address, and which keys can keep others out.

Knows: addresses, keys. Does not know about HTTP or what is served; needs no web framework.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from kveraser.errors import OptionError

_KEY = re.compile(r"[!-~]+")  # what a header can carry as it is


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_keys(keys: Sequence[str]) -> None:
    """Refuse API keys that would let everybody in, or that no client could send.

    Raises:
        OptionError: a key that is empty, blank, or has blanks or characters that are not ASCII; the key is not shown.
    """
    for number, key in enumerate(keys, start=1):
        if not key.strip():
            raise OptionError(
                f"API key {number} of {len(keys)} is empty; is the variable that it comes from set? "
                "Leave the option out to serve without keys"
            )
        if not _KEY.fullmatch(key):
            raise OptionError(
                f"API key {number} of {len(keys)} has blanks or characters that no header carries as they are; "
                "take letters, digits and punctuation of ASCII"
            )


def check_exposure(host: str, has_key: bool, remedy: str) -> None:
    """Refuse to serve others without a key.

    Args:
        remedy: how a key is given.

    Raises:
        OptionError: other machines can reach that address, and there is no key.
    """
    if not has_key and not is_loopback(host):
        raise OptionError(f"{host} can be reached from other machines; {remedy}, or listen on 127.0.0.1")
