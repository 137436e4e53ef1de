"""What is kept of an evaluation while it runs: one line of JSON per example, protocol and method.

Knows: files. Does not know how the numbers come about, or what is made of them.

A run may be killed at any moment: a line is written in one piece, so that at most the last one is broken. It is dropped
when the run goes on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kveraser.errors import OptionError
from kveraser.files import write_atomically

RECORDS, RESULTS = "examples.jsonl", "results.json"


Key = tuple[str, int, int, str, str]
"""Task, length, index (counting the examples of a task and length), protocol and method: what a record is about."""


@dataclass(frozen=True)
class Record:
    """One method on one example in one protocol.

    Attributes:
        task, length, index, protocol, method: see `Key`.
        tokens, tokens_erased: of the context, and of its spans.
        gold, erased: the right answer without the spans, and the one that only they support.
        exact_match, f1: of the answer against the gold one; None without one.
        leaked: whether the answer says the erased one; None without one.
        used, answer, kl, agreement, leak_margin, tokens_recomputed, residual, milliseconds: as in `MethodResult`.
    """

    task: str
    length: int
    index: int
    protocol: str
    method: str
    used: str
    tokens: int
    tokens_erased: int
    answer: str
    gold: str | None
    erased: str | None
    exact_match: bool | None
    f1: float | None
    leaked: bool | None
    leak_margin: float | None
    kl: float
    agreement: float
    tokens_recomputed: int
    residual: float | None
    milliseconds: float

    @property
    def key(self) -> Key:
        """What the record is about."""
        return self.task, self.length, self.index, self.protocol, self.method


class RunLog:
    """The records of a run, in a folder or in memory only.

    Args:
        header: what identifies the run (`options`) and where it is made, for `results.json`.
        folder: an unfinished run with the same options in it goes on; None keeps nothing.
        fresh: start anew, whatever is there.

    Raises:
        OptionError: the folder holds a run with other options, or a damaged one.
    """

    def __init__(self, header: dict[str, Any], folder: Path | None = None, fresh: bool = False) -> None:
        self.header = header
        self.folder = folder
        self.records: list[Record] = []
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"cannot write results into {folder}: {error}") from error
        file = folder / RECORDS
        if fresh:
            file.unlink(missing_ok=True)
        self.records = _read(file)
        if self.records:
            _check_options(folder, header["options"])
        else:
            write_json(folder / RESULTS, {**header, "complete": False, "rows": []})

    def add(self, record: Record) -> None:
        """Keep a record; it is in the file when this returns."""
        self.records.append(record)
        if self.folder is not None:
            line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
            with (self.folder / RECORDS).open("ab", buffering=0) as file:
                file.write(line.encode())


def write_json(file: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_atomically(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _read(file: Path) -> list[Record]:
    """The records in a file; a broken last line is cut off it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_atomically(file, whole)
    names = {entry.name for entry in fields(Record)}
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry.keys() != names:
                raise ValueError("it has other fields than this version writes")
            records.append(Record(**entry))
        except (ValueError, AttributeError) as error:
            raise OptionError(f"line {number} of {file} cannot be read ({error}); start anew with --fresh") from error
    return records


def _check_options(folder: Path, options: dict[str, Any]) -> None:
    try:
        there = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{folder / RESULTS} does not say with which options the records beside it were made "
            f"({type(error).__name__}); start anew with --fresh"
        ) from error
    now = json.loads(json.dumps(options))
    differing = [f"{name} is {now.get(name)}, was {there.get(name)}"
                 for name in sorted({*now, *there}) if now.get(name) != there.get(name)]  # fmt: skip
    if differing:
        raise OptionError(
            f"{folder} holds a run with other options: {'; '.join(differing)}. Give the same ones to go on with it, "
            "--fresh to start anew, or another --output"
        )
