"""What a client is told of a body that is not valid: one field, by its place in the client's own JSON, and what is wrong.

Knows: the validation errors of pydantic. Does not know which fields there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = {
    "extra_forbidden": "is not served, and nothing is ignored; is the name right?",
    "missing": "is needed",
    "json_invalid": "the body is no valid JSON",
}

_LONGEST = 200  # characters of a field's name: it may be the client's invention


def explain(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str | None, str]:
    """The field, as in `messages[0].content` (None for the body as a whole), and a message about it.

    Args:
        errors: as pydantic gives them; where a field may have several types, there is one for each.
        body: what the client sent.
    """
    found = [(_path(error["loc"], error["type"], body), error) for error in errors]
    path, error = max(found, key=lambda entry: len(entry[0]))  # the most precise one; the first of several
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    param = param.encode("utf-8", "replace").decode()[:_LONGEST]
    text = _WORDS.get(error["type"], str(error["msg"]).removeprefix("Value error, "))
    return param or None, f"{param or 'body'}: {text}"


def _path(place: Sequence[str | int], kind: str, body: Any) -> tuple[str | int, ...]:
    """The parts of an error's place that are places in the body: others name types of ours."""
    source, *rest = place
    if source != "body":
        return tuple(rest)
    if kind == "json_invalid":
        return ()
    path: list[str | int] = []
    here = body
    for number, part in enumerate(rest, start=1):
        if isinstance(part, str) and isinstance(here, Mapping):
            if part in here:
                here = here[part]
            elif kind != "missing" or number < len(rest):
                continue
        elif isinstance(part, int) and isinstance(here, Sequence) and not isinstance(here, str) and part < len(here):
            here = here[part]
        else:
            continue
        path.append(part)
    return tuple(path)
