"""Saved sessions: a folder with `session.json` and one file of states, versioned and checksummed.

Knows: files, and what of a context has to be kept. Does not know what states look like (their backend does), or about methods.

The states go into a file named after their checksum; `session.json` names it and is exchanged last, so that a reader sees
the old session or the new one, never a mixture. Nothing that is loaded is executable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kveraser.cache import Marks
from kveraser.context.chat import Message
from kveraser.context.ids import IdBuffer
from kveraser.context.messages import Conversation
from kveraser.context.state import EditRecord
from kveraser.errors import RestoreError, SessionFileError
from kveraser.files import write_atomically
from kveraser.methods import EraseReceipt
from kveraser.spans import Erased, Span, SpanLedger

if TYPE_CHECKING:
    from kveraser.context.token_context import TokenContext

FORMAT = 1
INDEX = "session.json"


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
        marks = context.backend.marks
        index |= {
            "erased": [[e.span.start, e.span.end, e.in_cache] for e in context._ledger.erased],
            "approximate_from": marks.approximate_from,
            "steered": [[span.start, span.end] for span in marks.steered_spans],
            "edits": [_record_to_json(record) for record in context._records.values()],
            "messages": [asdict(message) for message, _ in chat],
            "message_spans": [[span.start, span.end] for _, span in chat],
        }
        return cls(index, data, context.backend.stored_as)

    def install(self, context: TokenContext, what: str) -> Conversation:
        """Put it into an empty context; returns the messages. `what` says in errors where it was read from.

        Raises:
            SessionFileError: it is of another model, or cannot be read.
        """
        index, backend = self.index, context.backend
        with _readable(what):
            context._ids = IdBuffer(backend.unpack(index, self.data))
            context._ledger = SpanLedger(len(context._ids), (Erased(Span(a, b), c) for a, b, c in index["erased"]))
            context._records = {entry.receipt.id: entry for entry in map(_record_from_json, index["edits"])}
            steered = tuple(backend.steered(Span(a, b)) for a, b in index["steered"])
            backend.marks = Marks(index["approximate_from"], steered)
            context._rebuild_slots()
            messages = (Message(**entry) for entry in index.get("messages", ()))  # older ones of engines have none
            return Conversation(messages, (Span(a, b) for a, b in index.get("message_spans", ())))


def write_session(folder: Path, session: Session, *, overwrite: bool = False) -> None:
    """Write a session; what an older one left in the folder is removed afterwards.

    Args:
        overwrite: also overwrite the older files with zeros before they are removed (best effort: a copy-on-write or
            journaling disk may keep the old bytes all the same).

    Raises:
        SessionFileError: the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SessionFileError(f"{folder} is a file; a session is saved to a folder")
    name, suffix = session.stored_as
    checksum = hashlib.sha256(session.data).hexdigest()
    states = folder / f"{name}-{checksum[:16]}{suffix}"
    old = [file for file in folder.glob(f"{name}-*{suffix}") if file.name != states.name]
    write_atomically(states, session.data)
    body = {**session.index, name: {"file": states.name, "sha256": checksum, "bytes": len(session.data)}}
    envelope = {"format": FORMAT, "sha256": _checksum(body), "session": body}
    index = folder / INDEX
    former = folder / f".former-{INDEX}"
    if overwrite and index.exists():  # a second name for the old bytes, so that they can be overwritten afterwards
        former.unlink(missing_ok=True)
        os.link(index, former)
        old.append(former)
    write_atomically(index, json.dumps(envelope, sort_keys=True, indent=1).encode())
    for file in old:
        if overwrite:
            file.write_bytes(b"\0" * file.stat().st_size)
        file.unlink(missing_ok=True)


def read_session(folder: Path, stored_as: tuple[str, str]) -> Session:
    """Read and check a session.

    Raises:
        SessionFileError: missing, truncated, altered, or of a newer format.
    """
    index_file = folder / INDEX
    with _readable(str(folder)):
        envelope = json.loads(index_file.read_text(encoding="utf-8"))
        form = envelope["format"]
        if form > FORMAT:
            raise SessionFileError(f"{index_file} has format {form}, this version reads {FORMAT}; update kveraser")
        body = envelope["session"]
        if _checksum(body) != envelope["sha256"]:
            raise SessionFileError(
                f"{index_file} was altered: its checksum does not fit; restore the file or start a new session"
            )
        expected = body[stored_as[0]]
        file = folder / str(expected["file"])
        if file.parent != folder:
            raise SessionFileError(f"{index_file} names a states file outside its folder: {expected['file']}")
        data = file.read_bytes()
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise SessionFileError(
                f"{file} is truncated or altered ({len(data)} of {expected['bytes']} bytes, or another checksum)"
            )
        return Session(body, data, stored_as)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block says that this cannot be read as a session."""
    try:
        yield
    except FileNotFoundError as error:
        raise SessionFileError(f"{error.filename} is missing; {what} holds no complete session") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, SessionFileError):
            raise
        why = error if isinstance(error, RestoreError) else repr(error)
        raise SessionFileError(f"{what} cannot be read as a session: {why}") from error


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _record_to_json(record: EditRecord) -> dict[str, Any]:
    receipt = asdict(replace(record.receipt, undo=None))
    receipt.pop("undo")
    return {"receipt": receipt, "dropped": [asdict(span) for span in record.dropped], "purged": record.purged}


def _receipt_fields(written: dict[str, Any]) -> dict[str, Any]:
    """The fields of a receipt as `asdict` and JSON left them, spans as spans again; `stand_ins` stay as they are."""
    fields = dict(written)
    for name in ("spans", "removed", "steered", "recomputed"):  # older sessions do not say what was recomputed
        fields[name] = tuple(Span(**span) for span in fields.get(name, ()))
    fields["notes"] = tuple(fields.get("notes", ()))
    return fields


def _record_from_json(entry: dict[str, Any]) -> EditRecord:
    fields = _receipt_fields(entry["receipt"])
    fields["stand_ins"] = tuple((Span(**span), source) for span, source in fields["stand_ins"])
    dropped = tuple(Span(**span) for span in entry["dropped"])
    return EditRecord(EraseReceipt(**fields), dropped, entry.get("purged", False))
