"""What a saved session says, and how it becomes a context again.

Knows: what of a context has to be kept, as JSON and bytes. Does not know files (`session_folder.py`), what states look like (their
backend does), or methods. Nothing that is loaded is executable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kveraser.cache import Marks
from kveraser.context.chat import Message
from kveraser.context.ids import IdBuffer
from kveraser.context.messages import Conversation
from kveraser.context.state import EditRecord
from kveraser.errors import DamagedError, RestoreError, SessionFileError
from kveraser.methods import EraseReceipt
from kveraser.spans import Erased, Placed, Span, SpanLedger

if TYPE_CHECKING:
    from kveraser.context.token_context import TokenContext


@dataclass(frozen=True)
class Session:
    """Everything a session holds.

    Attributes:
        index: JSON.
        data: the states, in the backend's own form.
        stored_as: of the backend.
    """

    index: dict[str, Any]
    data: bytes
    stored_as: tuple[str, str]

    @classmethod
    def of(cls, context: TokenContext, chat: Conversation) -> Session:
        """The state of a live context."""
        index, data = context.backend.pack(context._ids.view)
        marks, ledger = context.backend.marks, context._ledger
        placed = ledger.placed
        index |= {
            "erased": [[e.span.start, e.span.end, e.in_cache, *([e.taken] if placed else [])] for e in ledger.erased],
            "placed": [[p.span.start, p.span.end, p.before] for p in placed],
            "approximate_from": marks.approximate_from,
            "steered": [[span.start, span.end] for span in marks.steered_spans],
            "edits": [_record_to_json(record) for record in context._records.values()],
            "messages": [asdict(message) for message, _ in chat],
            "message_spans": [[span.start, span.end] for _, span in chat],
        }
        return cls(index, data, context.backend.stored_as)

    @classmethod
    def of_bytes(cls, index: bytes, data: bytes, stored_as: tuple[str, str]) -> Session:
        """What `to_bytes` gave.

        Raises:
            SessionFileError: of another kind of context.
        """
        said = json.loads(index)
        if said["stored_as"] != stored_as[0]:
            raise SessionFileError(f"it holds {said['stored_as']}, this kind of context has {stored_as[0]}")
        return cls(said, data, stored_as)

    def to_bytes(self) -> list[bytes]:
        """Index and states."""
        return [json.dumps({**self.index, "stored_as": self.stored_as[0]}).encode(), self.data]

    def install(self, context: TokenContext, what: str) -> Conversation:
        """Put it into an empty context; returns the messages. `what` says in errors where it was read from.

        Raises:
            SessionFileError: it is of another model, or cannot be read.
        """
        index, backend = self.index, context.backend
        with readable(what):
            context._ids = IdBuffer(backend.unpack(index, self.data))
            erased = (Erased(Span(a, b), *more) for a, b, *more in index["erased"])
            placed = (Placed(Span(a, b), before) for a, b, before in index.get("placed", ()))  # older ones have none
            context._ledger = SpanLedger(len(context._ids), erased, placed)
            context._records = {entry.receipt.id: entry for entry in map(_record_from_json, index["edits"])}
            steered = tuple(backend.steered(Span(a, b)) for a, b in index["steered"])
            backend.marks = Marks(index["approximate_from"], steered)
            context._slots = context._new_slots(context._ledger)
            messages = (Message(**entry) for entry in index.get("messages", ()))  # older ones of engines have none
            return Conversation(messages, (Span(a, b) for a, b in index.get("message_spans", ())))


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block says that this cannot be read as a session."""
    try:
        yield
    except FileNotFoundError as error:
        raise SessionFileError(f"{error.filename} is missing; {what} holds no complete session") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, SessionFileError):
            raise
        why = error if isinstance(error, DamagedError | RestoreError) else repr(error)
        raise SessionFileError(f"{what} cannot be read as a session: {why}") from error


def _record_to_json(record: EditRecord) -> dict[str, Any]:
    receipt = asdict(replace(record.receipt, undo=None))
    receipt.pop("undo")
    return {"receipt": receipt, "dropped": [asdict(span) for span in record.dropped], "purged": record.purged}


def _receipt_fields(written: dict[str, Any]) -> dict[str, Any]:
    """The fields of a receipt as `asdict` and JSON left them, spans as spans again; `stand_ins` stay as they are."""
    fields = dict(written)
    for name in (
        "spans",
        "removed",
        "steered",
        "recomputed",
        "replacements",
    ):  # older sessions do not say the last ones
        fields[name] = tuple(Span(**span) for span in fields.get(name, ()))
    fields["notes"], fields["puts"] = tuple(fields.get("notes", ())), ()
    return fields


def _record_from_json(entry: dict[str, Any]) -> EditRecord:
    fields = _receipt_fields(entry["receipt"])
    fields["stand_ins"] = tuple((Span(**span), source) for span, source in fields["stand_ins"])
    dropped = tuple(Span(**span) for span in entry["dropped"])
    return EditRecord(EraseReceipt(**fields), dropped, entry.get("purged", False))
