"""Saved llama.cpp contexts: a folder with `session.json` and the cells in llama.cpp's own format, checksummed.

Knows: files, and what of a context has to be kept. Does not know about text or methods.

The cells go into a file named after their checksum; `session.json` names it and is exchanged last, so that a reader sees
the old session or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kveraser.cache import Marks, Steered
from kveraser.context.ids import IdBuffer
from kveraser.context.session_file import receipt_fields
from kveraser.engines.llama_cpp.cells import States
from kveraser.engines.llama_cpp.library import VERSION
from kveraser.engines.llama_cpp.model import LlamaCppModel
from kveraser.engines.llama_cpp.state import EditRecord, LlamaCppReceipt, LlamaCppState
from kveraser.errors import RestoreError, SessionFileError
from kveraser.files import write_atomically
from kveraser.spans import Erased, Span, SpanLedger

FORMAT = 1
INDEX = "session.json"


@dataclass(frozen=True)
class SavedSession:
    """A session as it was read: its index, its cells, and how the cache is to be made."""

    index: dict[str, Any]
    states: States | None
    length: int
    settings: dict[str, Any]


def write_session(context: LlamaCppState, folder: Path) -> Path:
    """Write a session; the cells of an older one in the folder are removed afterwards."""
    if folder.exists() and not folder.is_dir():
        raise SessionFileError(f"{folder} is a file; a session is saved to a folder")
    slots = context._slots
    data = context._cells.read([Span(0, slots)]).tobytes() if slots else b""
    checksum = hashlib.sha256(data).hexdigest()
    file = folder / f"cells-{checksum[:16]}.bin"
    marks = context._marks
    body = {
        "engine": f"llama-cpp-python {VERSION}",
        "model": context.model.identity(),
        "length": context._cells.length,
        "settings": context._cells.settings,
        "ids": context._ids.view.tolist(),
        "erased": [[e.span.start, e.span.end, e.in_cache] for e in context._ledger.erased],
        "approximate_from": marks.approximate_from,
        "steered": [[span.start, span.end] for span in marks.steered_spans],
        "edits": [_record_to_json(record) for record in context._records.values()],
        "cells": {"file": file.name, "sha256": checksum, "bytes": len(data)},
    }
    text = json.dumps(body, sort_keys=True)
    envelope = {"format": FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest(), "session": body}
    old = [found for found in folder.glob("cells-*.bin") if found.name != file.name]
    write_atomically(file, data)
    write_atomically(folder / INDEX, json.dumps(envelope, sort_keys=True).encode())
    for found in old:
        found.unlink(missing_ok=True)
    return folder


def read_session(folder: Path, model: LlamaCppModel) -> SavedSession:
    """Read and check a session.

    Raises:
        SessionFileError: missing, truncated, altered, of a newer format, another model, or another llama.cpp.
    """
    index = folder / INDEX
    try:
        envelope = json.loads(index.read_text(encoding="utf-8"))
        if envelope["format"] > FORMAT:
            raise SessionFileError(
                f"{index} has format {envelope['format']}, this version reads {FORMAT}; update kveraser"
            )
        body = envelope["session"]
        if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != envelope["sha256"]:
            raise SessionFileError(f"{index} was altered: its checksum does not fit; start a new session")
        if body["engine"] != f"llama-cpp-python {VERSION}":
            raise SessionFileError(f"{folder} was saved by {body['engine']}; this is {VERSION}, whose cells may differ")
        if body["model"] != model.identity():
            raise SessionFileError(f"{folder} was saved with another model: {body['model']}")
        name = str(body["cells"]["file"])
        if Path(name).name != name:
            raise SessionFileError(f"{index} names a file outside its folder: {name}")
        data = (folder / name).read_bytes()
        if len(data) != body["cells"]["bytes"] or hashlib.sha256(data).hexdigest() != body["cells"]["sha256"]:
            raise SessionFileError(f"{folder / name} is truncated or altered ({len(data)} bytes)")
        states = np.frombuffer(data, np.uint8).copy() if data else None
        return SavedSession(body, states, int(body["length"]), dict(body["settings"]))
    except FileNotFoundError as error:
        raise SessionFileError(f"{error.filename} is missing; {folder} holds no complete session") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, SessionFileError):
            raise
        raise SessionFileError(f"{folder} cannot be read as a session: {error!r}") from error


def install(context: LlamaCppState, saved: SavedSession) -> None:
    """Put a session into an empty context."""
    index = saved.index
    try:
        if saved.states is not None:
            context._cells.write(saved.states)
    except RestoreError as error:
        raise SessionFileError(f"the cells of the session do not fit: {error}") from error
    context._ids = IdBuffer(torch.tensor(index["ids"], dtype=torch.long))
    context._ledger = SpanLedger(len(index["ids"]), (Erased(Span(a, b), c) for a, b, c in index["erased"]))
    steered = tuple(Steered(Span(a, b), torch.empty(0)) for a, b in index["steered"])
    context._marks = Marks(index["approximate_from"], steered)
    for entry in index["edits"]:
        record = _record_from_json(entry)
        context._records[record.receipt.id] = record


def _record_to_json(record: EditRecord) -> dict[str, Any]:
    receipt = asdict(replace(record.receipt, kept=None, undo=None))
    receipt.pop("kept")
    receipt.pop("undo")
    return {"receipt": receipt, "dropped": [asdict(span) for span in record.dropped]}


def _record_from_json(entry: dict[str, Any]) -> EditRecord:
    fields = receipt_fields(entry["receipt"])
    fields["stand_ins"] = ()
    return EditRecord(LlamaCppReceipt(**fields), tuple(Span(**span) for span in entry["dropped"]))
