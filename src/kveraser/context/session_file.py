"""Saved sessions: a folder with `session.json` and one safetensors file, versioned and checksummed.

Knows: files, and what of a context has to be kept. Does not know about text or methods.

The states go into a file named after their checksum; `session.json` names it and is exchanged last, so that a reader sees
the old session or the new one, never a mixture. Nothing that is loaded is executable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from kveraser.cache import GrowableLayer, Marks, Steered, append, cache_length, get_marks, read, set_marks
from kveraser.context.chat import Message
from kveraser.context.ids import IdBuffer
from kveraser.context.state import EditRecord
from kveraser.errors import SessionFileError
from kveraser.files import write_atomically
from kveraser.methods import EraseReceipt
from kveraser.model.fingerprint import Fingerprint
from kveraser.model.view import model_device, model_dtype
from kveraser.spans import Erased, Span, SpanLedger

if TYPE_CHECKING:
    from kveraser.context.token_context import TokenContext

FORMAT = 1
INDEX = "session.json"


@dataclass(frozen=True)
class SessionState:
    """Everything a session file holds: `index` (JSON without the messages) and `tensors`."""

    index: dict[str, Any]
    tensors: dict[str, Tensor]
    messages: tuple[Message, ...]
    message_spans: tuple[Span, ...]

    @classmethod
    def of(cls, context: TokenContext, messages: Sequence[Message], message_spans: Sequence[Span]) -> SessionState:
        """The state of a live context."""
        tensors = {"ids": context._ids.view.contiguous()}
        length = cache_length(context.cache)
        if length:
            for number, (keys, values) in enumerate(read(context.cache, Span(0, length))):
                tensors[f"keys.{number:03}"] = keys.contiguous()
                tensors[f"values.{number:03}"] = values.contiguous()
        marks = get_marks(context.cache)
        index = {
            "fingerprint": asdict(Fingerprint.of(context.model)),
            "length": length,
            "erased": [[e.span.start, e.span.end, e.in_cache] for e in context._ledger.erased],
            "approximate_from": marks.approximate_from,
            "steered": [[span.start, span.end] for span in marks.steered_spans],
            "edits": [_record_to_json(record) for record in context._records.values()],
        }
        return cls(index, tensors, tuple(messages), tuple(message_spans))

    def install(self, context: TokenContext) -> None:
        """Put the state into an empty context."""
        index, device = self.index, model_device(context.model)
        context._ids = IdBuffer(self.tensors["ids"])
        context._ledger = SpanLedger(len(context._ids), (Erased(Span(a, b), c) for a, b, c in index["erased"]))
        context._records = {}
        for entry in index["edits"]:
            record = _record_from_json(entry)
            context._records[record.receipt.id] = record
        layers = sorted(name for name in self.tensors if name.startswith("keys."))
        if layers:
            context.cache.layers.extend(GrowableLayer() for _ in layers)
            pairs = [(self.tensors[name], self.tensors[name.replace("keys", "values")]) for name in layers]
            append(context.cache, [(keys.to(device), values.to(device)) for keys, values in pairs])
            steered = tuple(Steered.mark(context.cache, Span(a, b)) for a, b in index["steered"])
            set_marks(context.cache, Marks(index["approximate_from"], steered))
        context._rebuild_slots()


def write_session(folder: Path, state: SessionState, *, overwrite: bool = False) -> None:
    """Write a session; what an older one left in the folder is removed afterwards.

    Args:
        overwrite: also overwrite the older files with zeros before they are removed (best effort: a copy-on-write or
            journaling disk may keep the old bytes all the same).

    Raises:
        SessionFileError: the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SessionFileError(f"{folder} is a file; a session is saved to a folder")
    data = save({name: tensor.cpu() for name, tensor in state.tensors.items()})
    checksum = hashlib.sha256(data).hexdigest()
    states = folder / f"states-{checksum[:16]}.safetensors"
    old = [file for file in folder.glob("states-*.safetensors") if file.name != states.name]
    write_atomically(states, data)
    body = {
        **state.index,
        "messages": [asdict(message) for message in state.messages],
        "message_spans": [[span.start, span.end] for span in state.message_spans],
        "states": {"file": states.name, "sha256": checksum, "bytes": len(data)},
    }
    text = json.dumps(body, sort_keys=True)
    envelope = {"format": FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest(), "session": body}
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


def read_session(folder: Path, model: nn.Module) -> SessionState:
    """Read and check a session.

    Raises:
        SessionFileError: missing, truncated, altered, of a newer format, or of another model.
    """
    index_file = folder / INDEX
    try:
        envelope = json.loads(index_file.read_text(encoding="utf-8"))
        form = envelope["format"]
        if form > FORMAT:
            raise SessionFileError(f"{index_file} has format {form}, this version reads {FORMAT}; update kveraser")
        body = envelope["session"]
        if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != envelope["sha256"]:
            raise SessionFileError(
                f"{index_file} was altered: its checksum does not fit; restore the file or start a new session"
            )
        file = folder / str(body["states"]["file"])
        if file.parent != folder:
            raise SessionFileError(f"{index_file} names a states file outside its folder: {body['states']['file']}")
        data = file.read_bytes()
        expected = body["states"]
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise SessionFileError(
                f"{file} is truncated or altered ({len(data)} of {expected['bytes']} bytes, or another checksum)"
            )
        tensors = load(data)
        messages = tuple(Message(**entry) for entry in body.pop("messages"))
        spans = tuple(Span(a, b) for a, b in body.pop("message_spans"))
        difference = Fingerprint(**body["fingerprint"]).difference(model)
    except FileNotFoundError as error:
        raise SessionFileError(f"{error.filename} is missing; {folder} holds no complete session") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, SessionFileError):
            raise
        raise SessionFileError(f"{folder} cannot be read as a session: {error!r}") from error
    if difference is not None:
        raise SessionFileError(f"{folder} was saved with another model: {difference}")
    states = tensors.get("keys.000")
    if states is not None and states.dtype != model_dtype(model):
        raise SessionFileError(
            f"{folder} holds {states.dtype} states and the model computes in {model_dtype(model)}; load it with that dtype"
        )
    return SessionState(body, tensors, messages, spans)


def _record_to_json(record: EditRecord) -> dict[str, Any]:
    receipt = asdict(replace(record.receipt, undo=None))
    receipt.pop("undo")
    return {"receipt": receipt, "dropped": [asdict(span) for span in record.dropped], "purged": record.purged}


def receipt_fields(written: dict[str, Any]) -> dict[str, Any]:
    """The fields of a receipt as `asdict` and JSON left them, spans as spans again; `stand_ins` stay as they are."""
    fields = dict(written)
    for name in ("spans", "removed", "steered", "recomputed"):  # older sessions do not say what was recomputed
        fields[name] = tuple(Span(**span) for span in fields.get(name, ()))
    fields["notes"] = tuple(fields.get("notes", ()))
    return fields


def _record_from_json(entry: dict[str, Any]) -> EditRecord:
    fields = receipt_fields(entry["receipt"])
    fields["stand_ins"] = tuple((Span(**span), source) for span, source in fields["stand_ins"])
    dropped = tuple(Span(**span) for span in entry["dropped"])
    return EditRecord(EraseReceipt(**fields), dropped, entry["purged"])
