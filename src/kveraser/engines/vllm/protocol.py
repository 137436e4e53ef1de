"""What is said in `kv_transfer_params["kveraser"]` of a request and of its response.

Knows: JSON. Does not know about vLLM, HTTP or files. Entries are named by opaque ids that only the engine gives out; there
are no paths in it.

Request (one or several of):
    edit      id                        serve this edited context: it begins the prompt
    load      [[id, from, to, move]..]  put these states into the first positions, keys moved by `move` positions
    compose   [[id, from, to]..]        the same, and remember it as an edited context
    save      [[from, to, move]..]      keep the states of these positions of the prompt, keys moved
    drop      [id..]                    forget entries
    about     true                      say how the engine is set up
    client    id                        who asks: what it keeps is counted as its own when room is needed
Response:
    saved [id..], edit {id, tokens, salt}, about {..}, or error "..."
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kveraser.errors import EngineError

KEY = "kveraser"
_ID = re.compile(r"[0-9a-f]{32}")
_NAMES = {"edit", "load", "compose", "save", "drop", "about", "client"}


class _Stretch:
    """`[start, end)` of something."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Piece(_Stretch):
    """States `[start, end)` of an entry, with keys moved by `move` positions."""

    entry: str
    start: int
    end: int
    move: int = 0

    def cut(self, start: int, end: int) -> Piece:
        """The states `[start, end)` of the piece, counted from its own beginning."""
        return Piece(self.entry, self.start + start, self.start + end, self.move)


@dataclass(frozen=True)
class Save(_Stretch):
    """Positions `[start, end)` of a prompt whose states are to be kept, with keys moved by `move` positions."""

    start: int
    end: int
    move: int = 0


@dataclass(frozen=True)
class Demand:
    """What a request asks the connector for."""

    edit: str | None = None
    load: tuple[Piece, ...] = ()
    compose: tuple[Piece, ...] = ()
    save: tuple[Save, ...] = ()
    drop: tuple[str, ...] = ()
    about: bool = False
    client: str | None = None

    def params(self) -> dict[str, Any]:
        """The value for a request's `kv_transfer_params`."""
        said: dict[str, Any] = {}
        if self.edit:
            said["edit"] = self.edit
        for name, pieces in (("load", self.load), ("compose", self.compose)):
            if pieces:
                said[name] = [[piece.entry, piece.start, piece.end, piece.move] for piece in pieces]
        if self.save:
            said["save"] = [[entry.start, entry.end, entry.move] for entry in self.save]
        if self.drop:
            said["drop"] = list(self.drop)
        if self.about:
            said["about"] = True
        if self.client:
            said["client"] = self.client
        return {KEY: said}


def read_demand(params: Any) -> Demand | None:
    """What a request's `kv_transfer_params` ask for; None when they are not for us.

    Raises:
        EngineError: not as described above.
    """
    if not isinstance(params, dict) or KEY not in params:
        return None
    said = params[KEY]
    if not isinstance(said, dict) or not set(said) <= _NAMES:
        raise EngineError(f"kv_transfer_params[{KEY!r}] must hold some of {sorted(_NAMES)}, got {said!r:.200}")
    try:
        demand = Demand(
            edit=None if said.get("edit") is None else checked_id(said["edit"]),
            load=tuple(_piece(entry) for entry in said.get("load", ())),
            compose=tuple(_piece(entry) for entry in said.get("compose", ())),
            save=tuple(Save(*_range(*entry)) for entry in said.get("save", ())),
            drop=tuple(checked_id(entry) for entry in said.get("drop", ())),
            about=bool(said.get("about", False)),
            client=None if said.get("client") is None else checked_id(said["client"]),
        )
    except (TypeError, ValueError) as error:
        raise EngineError(f"kv_transfer_params[{KEY!r}] is malformed: {error}; got {said!r:.200}") from error
    if sum((demand.edit is not None, bool(demand.load), bool(demand.compose))) > 1:
        raise EngineError("a request takes its states from one of edit, load and compose")
    return demand


def checked_id(value: Any) -> str:
    """`value`, if it has the form of an id (32 hexadecimal digits).

    Raises:
        EngineError: anything else, a path for instance.
    """
    if not isinstance(value, str) or not is_id(value):
        raise EngineError(f"an entry's id has 32 hexadecimal digits, got {value!r:.80}")
    return value


def is_id(value: str) -> bool:
    """Whether `value` has the form of an id."""
    return _ID.fullmatch(value) is not None


def take(pieces: Iterable[Piece], start: int, end: int) -> tuple[Piece, ...]:
    """The pieces that cover positions `[start, end)` of what `pieces` make up one behind the other."""
    taken, at = [], 0
    for piece in pieces:
        low, high = max(start, at), min(end, at + len(piece))
        if low < high:
            taken.append(piece.cut(low - at, high - at))
        at += len(piece)
    return tuple(taken)


def put(pieces: Iterable[Piece], start: int, new: Piece) -> tuple[Piece, ...]:
    """`pieces` with `new` in place of what was at positions `[start, start + len(new))`."""
    old = tuple(pieces)
    return (*take(old, 0, start), new, *take(old, start + len(new), sum(len(piece) for piece in old)))


def _piece(entry: Any) -> Piece:
    name, *numbers = entry
    return Piece(checked_id(name), *_range(*numbers))


def _range(start: Any, end: Any, move: Any = 0) -> tuple[int, int, int]:
    if any(type(number) is not int for number in (start, end, move)):
        raise ValueError(f"whole numbers are needed, got {(start, end, move)!r:.80}")
    if not 0 <= start < end:
        raise ValueError(f"[{start}, {end}) is no range")
    return start, end, move
