"""How large a JSON schema is once its references are followed, which is how long validating may take.

Knows: the keywords of JSON schemas, where references may lead. Does not know about tools, or how anything is validated.

A few references that each occur twice in the next one make a schema of two kilobytes that a validator walks through for hours. So they are
counted before anything is validated. A reference is taken to lead to the largest of all places that it could mean, whatever the
drafts say of bases, anchors and scopes; one that could mean none is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

MOST_NODES = 100_000
"""Schemas within a schema, one in two places counted twice."""

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_NAMES = ("$id", "id", "$anchor", "$dynamicAnchor")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies")
_APPLIED = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "additionalProperties", "unevaluatedProperties",
            "propertyNames", "items", "prefixItems", "additionalItems", "unevaluatedItems", "contains")  # fmt: skip

Schema = Mapping[str, Any]
_PLAIN: Schema = {}


@dataclass(frozen=True)
class Expanded:
    """A schema with its references followed.

    Attributes:
        nodes: schemas in it, one in two places counted twice; within itself it counts as one.
        recursive: whether a schema is within itself.
    """

    nodes: int
    recursive: bool


def expanded(schema: Schema) -> Expanded:
    """What a schema is with its references followed.

    Raises:
        ValueError: there are too many schemas in it, or a reference that leads nowhere.
        RecursionError: it is nested too deeply.
    """
    walk = _Walk(schema)
    return Expanded(walk.nodes(schema), walk.recursive)


class _Walk:
    def __init__(self, root: Schema) -> None:
        self.recursive = False
        self._sizes: dict[int, int] = {}  # by the identity of the schema; 0 while it is being walked through
        self._resources, self._anchors = [root], dict[str, list[Schema]]()
        rest: list[Any] = [root]
        while rest:
            value = rest.pop()
            rest += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            if isinstance(value, Mapping):
                for name in (value[key] for key in _NAMES if isinstance(value.get(key), str)):
                    self._resources.append(value)
                    self._anchors.setdefault(unquote(name.rpartition("#")[2]), []).append(value)

    def nodes(self, schema: Schema) -> int:
        known = self._sizes.get(id(schema))
        if known is not None:
            self.recursive = self.recursive or known == 0
            return max(known, 1)
        self._sizes[id(schema)] = 0
        count = 1 + sum(map(self.nodes, _within(schema)))
        count += sum(self._largest(schema[key]) for key in _REFERENCES if isinstance(schema.get(key), str))
        if count > MOST_NODES:
            raise ValueError(
                f"with its references followed it has more than {MOST_NODES} schemas in it; use simpler ones"
            )
        self._sizes[id(schema)] = count
        return count

    def _largest(self, reference: str) -> int:
        found = list(self._places(unquote(reference.partition("#")[2])))
        if not found:
            raise ValueError(f"the reference {reference!r} leads to nothing in the schema")
        return max(map(self.nodes, found))

    def _places(self, fragment: str) -> Iterator[Schema]:
        """All places that a reference with this fragment could mean."""
        if not fragment:
            yield from self._resources
        elif not fragment.startswith("/"):
            yield from self._anchors.get(fragment, ())
        else:
            for resource in self._resources:
                place = _at(resource, fragment)
                if isinstance(place, (Mapping, bool)):
                    yield _PLAIN if isinstance(place, bool) else place


def _within(schema: Schema) -> Iterator[Schema]:
    """The schemas that are applied along with one."""
    for key in _MAPS:
        if isinstance(schema.get(key), Mapping):
            yield from (value for value in schema[key].values() if isinstance(value, Mapping))
    for key in _APPLIED:
        value = schema.get(key)
        yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Mapping))


def _at(value: Any, pointer: str) -> Any:
    """What a JSON pointer leads to; None where there is nothing."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value
