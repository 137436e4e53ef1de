"""What other packages add: classes that they register as entry points.

Knows: installed packages' entry points. Does not know what the classes do.

An entry point that cannot be loaded, is of another kind, or takes a name that is there already is passed over with a warning:
somebody else's mistake must not keep this library from working.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Named = TypeVar("Named")


def with_extensions(group: str, base: Any, own: Iterable[type[Named]]) -> dict[str, type[Named]]:
    """The classes of this library and then those of other packages, by their `name`.

    Args:
        group: of the entry points, such as `kveraser.methods`.
        base: what all of them derive from.
        own: the library's.
    """
    found: dict[str, type[Named]] = {_name(kind): kind for kind in own}
    for source, kind in _registered(group):
        if not (isinstance(kind, type) and issubclass(kind, base)):
            log.warning("%s in %s is no class below %s; it is not used", source, group, base.__name__)
        elif found.get(_name(kind), kind) is not kind:
            log.warning("%s in %s takes the name %r, which is taken; it is not used", source, group, _name(kind))
        else:
            found[_name(kind)] = kind
    return found


def _name(kind: Any) -> str:
    name: str = kind.name
    return name


@cache
def _registered(group: str) -> tuple[tuple[str, Any], ...]:
    """The entry points of a group, by name, with what each stands for; looked for once."""
    found = []
    for entry in sorted(entry_points(group=group), key=lambda each: each.name):
        try:
            found.append((entry.value, entry.load()))
        except Exception as error:  # anything may happen in somebody else's module
            log.warning("%s in %s cannot be loaded: %s: %s", entry.value, group, type(error).__name__, error)
    return tuple(found)
