"""What is said in `kv_transfer_params["kveraser"]` of a request and of its response.

Knows: JSON. Does not know about vLLM, HTTP or files. Entries are named by opaque ids that only the engine gives out; there
are no paths in it.

Request (one or several of):
    edit      id                        serve this edited context: it begins the prompt
    load      [[id, from, to, move]..]  put these states into the first positions, keys moved by `move` positions
    compose   [[id, from, to, move]..]  the same, and remember it as an edited context
    save      [[from, to, move]..]      keep the states of these positions of the prompt, keys moved
    drop      [id..]                    forget entries
    about     true                      say how the engine is set up
    client    id                        who asks: what it keeps is counted as its own when room is needed
    look      {pieces [[id, from, to]..], spans [[from, to]..], absent [[from, to]..], repair, block, coverage}
                                        say who has read the spans of the context that the pieces make up, and make states that
                                        hide a span; what is to be dropped is dropped when that is done
    observe   true                      with `save`: keep the queries of these positions, too, in further entries
    learn     {tokens, whole [id..], rest [id]}
                                        calibrate what tells readers on what two such requests have kept: a text, and the same without
                                        what a lesson leaves out
    under     id                        with `load`: requests under one id find each other's blocks in the prefix cache
Response:
    saved [id..], edit {id, tokens, salt}, about {..}, found {runs [[from, to]..], residual, notes [..], hidden [id, id]}, or error "..."

Servers and sessions of before `look` and `under` understand each other as they did: a server says under `about` what it can find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kveraser.errors import EngineError, KVEraserError
from kveraser.spans import Span, merge_spans

KEY = "kveraser"
_ID = re.compile(r"[0-9a-f]{32}")
_NAMES = {"edit", "load", "compose", "save", "drop", "about", "client", "look", "under", "observe", "learn"}
_LOOK = {"pieces", "spans", "absent", "repair", "block", "coverage"}


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
class Look:
    """A context in which spans are to be erased, and how their readers are chosen.

    Attributes:
        pieces: the states of all its slots, those of the spans among them.
        spans: slots to be erased, sorted and disjoint.
        absent: slots that hold steering states already.
        repair: tokens per span to recompute, at most (None: by its length); in whole runs on multiples of `block` slots.
        coverage: stop when so much of the attention that went to the spans is covered.
    """

    pieces: tuple[Piece, ...]
    spans: tuple[Span, ...]
    absent: tuple[Span, ...]
    repair: int | None
    block: int | None = None
    coverage: float | None = None

    @property
    def length(self) -> int:
        """Number of slots."""
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class Found:
    """Who has read the spans.

    Attributes:
        runs: what is to be recomputed.
        residual: the share of the attention to the spans that is then left; None where nothing was scored.
        notes: what did not go as asked, and why.
        hidden: two entries of as many tokens as the longest span has, with states that nothing attends to: by the tokens
            from the first run on, and by those behind the context.
    """

    runs: tuple[Span, ...]
    residual: float | None
    notes: tuple[str, ...]
    hidden: tuple[str, str]

    def said(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "runs": _pairs(self.runs),
            "residual": self.residual,
            "notes": list(self.notes),
            "hidden": list(self.hidden),
        }

    @classmethod
    def read(cls, said: dict[str, Any]) -> Found:
        """From JSON."""
        first, last = said["hidden"]
        runs = tuple(Span(*run) for run in said["runs"])
        return cls(runs, said["residual"], tuple(said["notes"]), (checked_id(first), checked_id(last)))


@dataclass(frozen=True)
class Learn:
    """Entries to calibrate on: states and queries of a text of so many tokens, and states of the text without some of them."""

    tokens: int
    whole: tuple[str, ...]
    rest: str


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
    look: Look | None = None
    under: str | None = None
    observe: bool = False
    learn: Learn | None = None

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
        if self.look:
            said["look"] = _said_look(self.look)
        if self.under:
            said["under"] = self.under
        if self.observe:
            said["observe"] = True
        if self.learn:
            said["learn"] = {"tokens": self.learn.tokens, "whole": list(self.learn.whole), "rest": self.learn.rest}
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
            look=None if said.get("look") is None else _look(said["look"]),
            under=None if said.get("under") is None else checked_id(said["under"]),
            observe=bool(said.get("observe", False)),
            learn=None if said.get("learn") is None else _learn(said["learn"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"kv_transfer_params[{KEY!r}] is malformed: {error}; got {said!r:.200}") from error
    if sum((demand.edit is not None, bool(demand.load), bool(demand.compose))) > 1:
        raise EngineError("a request takes its states from one of edit, load and compose")
    if (demand.look or demand.learn) and (demand.edit or demand.load or demand.compose or demand.save):
        raise EngineError("a request that looks for readers does nothing else with states")
    if demand.observe and (not demand.save or demand.edit or demand.load or demand.compose):
        raise EngineError("queries are kept of what is saved of a plain request")
    if demand.under and not demand.load:
        raise EngineError("blocks are shared under an id among requests that load states")
    return demand


@contextmanager
def reading(who: str) -> Iterator[None]:
    """Around what reads an answer.

    Args:
        who: has answered.

    Raises:
        EngineError: it lacks what is read, or has something else in its place.
    """
    try:
        yield
    except KVEraserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"{who} answered otherwise than it is read here ({type(error).__name__}: {error}); is it a vLLM server, of a version that "
            "this one works with?"
        ) from error


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


def _said_look(look: Look) -> dict[str, Any]:
    return {
        "pieces": [[piece.entry, piece.start, piece.end] for piece in look.pieces],
        "spans": _pairs(look.spans),
        "absent": _pairs(look.absent),
        "repair": look.repair,
        "block": look.block,
        "coverage": look.coverage,
    }


def _look(said: Any) -> Look:
    if not isinstance(said, dict) or not set(said) <= _LOOK:
        raise ValueError(f"look must hold some of {sorted(_LOOK)}")
    repair, block, coverage = said["repair"], said.get("block"), said.get("coverage")
    if not (_counts(repair, 0) and _counts(block, 1)):
        raise ValueError(f"repair={repair!r} and block={block!r} count tokens")
    if coverage is not None and (not isinstance(coverage, float | int) or not 0 < coverage <= 1):
        raise ValueError(f"coverage={coverage!r} is no share")
    pieces = tuple(_piece(entry) for entry in said["pieces"])
    if any(piece.move for piece in pieces):
        raise ValueError("states are looked at where they are, not moved")
    spans, absent = (
        tuple(sorted(Span(*_range(*entry)[:2]) for entry in said.get(name, ()))) for name in ("spans", "absent")
    )
    look = Look(pieces, spans, absent, repair, block, coverage)
    merge_spans(spans, look.length)
    merge_spans((*spans, *absent), look.length)
    if spans[-1].end == look.length:
        raise ValueError(f"nothing behind {spans[-1]} can have read it")
    return look


def _learn(said: Any) -> Learn:
    tokens, whole, rest = said["tokens"], said["whole"], said["rest"]
    if type(tokens) is not int or tokens < 1 or not isinstance(whole, list):
        raise ValueError(f"tokens={tokens!r} and whole={whole!r:.80} are no number and no list")
    return Learn(tokens, tuple(checked_id(entry) for entry in whole), checked_id(rest))


def _counts(value: Any, least: int) -> bool:
    """Whether it is a number of tokens, or is left open."""
    return value is None or (type(value) is int and value >= least)


def _pairs(spans: tuple[Span, ...]) -> list[list[int]]:
    return [[span.start, span.end] for span in spans]


def _piece(entry: Any) -> Piece:
    name, *numbers = entry
    return Piece(checked_id(name), *_range(*numbers))


def _range(start: Any, end: Any, move: Any = 0) -> tuple[int, int, int]:
    if any(type(number) is not int for number in (start, end, move)):
        raise ValueError(f"whole numbers are needed, got {(start, end, move)!r:.80}")
    if not 0 <= start < end:
        raise ValueError(f"[{start}, {end}) is no range")
    return start, end, move
