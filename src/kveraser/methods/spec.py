"""Methods as text, `NAME:OPTION=VALUE,...`, and back.

Knows: the fields of a method's dataclass. Does not know which methods there are.
"""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kveraser.errors import OptionError
from kveraser.methods.base import EraseMethod

_NEXT = re.compile(r",(?=\s*[a-z_]+\s*=)")
_UNIONS = (UnionType, type(Union[int, None]))  # noqa: UP007 - what `Literal[...] | None` is
_WORDS = {"none": None, "true": True, "false": False}


def text_options(kind: type[EraseMethod]) -> dict[str, Any]:
    """The options of a method that can be written as text (numbers, pairs of them, words, true, false, none): their defaults."""
    hints = get_type_hints(kind)
    return {entry.name: entry.default for entry in fields(kind) if _writable(hints[entry.name])}  # type: ignore[arg-type]


def method_from_text(kind: type[EraseMethod], options: str) -> EraseMethod:
    """A method from its options, such as `window=4,128,repair=32`.

    Raises:
        OptionError: an unknown option, or an impossible value.
    """
    hints, known = get_type_hints(kind), text_options(kind)
    given: dict[str, Any] = {}
    for entry in _NEXT.split(options):
        name, sign, text = (part.strip() for part in entry.partition("="))
        if name not in known or not sign:
            there = f"it has: {', '.join(known)}" if known else "it has none"
            raise OptionError(f"{kind.name} has no option {entry.strip()!r} (written as option=value); {there}")
        value = _value(text)
        if not _fits(value, hints[name]):
            raise OptionError(
                f"{kind.name}: {name}={text} cannot be; a value such as {name}={_example(hints[name])} can"
            )
        given[name] = value
    return kind(**given)


def method_label(method: EraseMethod) -> str:
    """The name, and the options that are not the default ones; `as_method` reads it back."""
    changed = [
        f"{name}={write_value(value)}"
        for name, default in text_options(type(method)).items()
        if (value := getattr(method, name)) != default
    ]
    return f"{method.name}:{','.join(changed)}" if changed else method.name


def write_value(value: Any) -> str:
    """An option's value as text."""
    if isinstance(value, tuple):
        return ",".join(map(write_value, value))
    if isinstance(value, str):
        return value
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that text can do to it
        return text


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, _UNIONS):
        return any(_fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return type(value) is hint or (hint is float and type(value) is int)


def _writable(hint: Any) -> bool:
    if isinstance(hint, _UNIONS) or get_origin(hint) is tuple:
        return all(map(_writable, get_args(hint)))
    if get_origin(hint) is Literal:
        return True
    return hint in (int, float, bool, NoneType)


def _example(hint: Any) -> str:
    if isinstance(hint, _UNIONS):
        return _example(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return str(get_args(hint)[0])
    if get_origin(hint) is tuple:
        return ",".join(map(_example, get_args(hint)))
    return {int: "16", float: "0.5"}.get(hint, "true")
