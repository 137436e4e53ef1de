"""What is kept of an evaluation while it runs: one line of JSON per example, protocol and method.

Knows: files. Does not know how the numbers come about, or what is made of them.

A run may be killed at any moment: a line is written whole, or taken back where that fails, so that at most the last one is broken. It
is dropped when the run goes on. Several processes may make one run, each a part of its examples and with a file of its own; all of them
are read.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from kveraser.errors import OptionError
from kveraser.files import disk, write_atomically

RECORDS, RESULTS = "examples.jsonl", "results.json"
_RECORDS = re.compile(r"examples(\.\d+-of-\d+)?\.jsonl")
"""Names of files of records: of a run and of its parts, and of nobody else's."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a run, counted from 1.

    Raises:
        OptionError: there is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise OptionError(f"part {self.number} of {self.count}: give 1/{self.count} to {self.count}/{self.count}")

    @classmethod
    def read(cls, text: str) -> Part:
        """`2/4` is the second of four."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise OptionError(f"{text!r} is not a part of a run, such as 2/4 for the second of four")
        return cls(int(found[1]), int(found[2]))

    @property
    def file(self) -> str:
        """The name of its records."""
        return f"examples.{self.number}-of-{self.count}.jsonl"

    def of(self, items: list[Item]) -> list[Item]:
        """Its share of the items: all parts together have each once."""
        return items[self.number - 1 :: self.count]


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
        recall, recalled: the answer to a request for what was taken back, and whether it says the erased answer; None where
            that was not asked.
        milliseconds: of the erase; None where other processes shared the machine, since these would be in it.
        commit: of the code that made it; None where that is no checkout.
        used, answer, kl, agreement, leak_margin, tokens_recomputed, residual: as in `MethodResult`.
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
    milliseconds: float | None
    recall: str | None = None
    recalled: bool | None = None
    commit: str | None = None

    @property
    def key(self) -> Key:
        """What the record is about."""
        return self.task, self.length, self.index, self.protocol, self.method


class RecordLog:
    """The records of a run, in a folder or in memory only.

    Args:
        header: what identifies the run (`options`) and where it is made, for `results.json`.
        folder: an unfinished run with the same options in it goes on; None keeps nothing.
        fresh: start anew, whatever is there, other parts of the run included.
        part: of the run that this process makes; None for all that is missing.

    Raises:
        OptionError: the folder holds a run with other options, a damaged one, or results without the records they were made of.
    """

    def __init__(
        self, header: dict[str, Any], folder: Path | None = None, fresh: bool = False, part: Part | None = None
    ) -> None:
        self.header = header
        self.folder = folder
        self.name = part.file if part else RECORDS
        self.records: list[Record] = []
        self._is_ours = False
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"cannot write results into {folder}: {error}") from error
        if fresh:
            for file in _files(folder):
                file.unlink()
        own = folder / self.name
        found = [record for file in _files(folder) for record in _read(file, mend=file == own)]
        self.records = list({record.key: record for record in found}.values())
        self._is_ours = bool(self.records)
        if self.records:
            _check_options(folder, header["options"])
        elif not fresh and _has_rows(folder / RESULTS):
            raise OptionError(
                f"{folder} has results but not the examples they were made of; to make them anew, give another --output or --fresh, "
                f"or delete {folder / RESULTS}"
            )
        else:
            write_json(folder / RESULTS, {**header, "complete": False, "rows": []})

    def add(self, record: Record) -> None:
        """Keep a record, with the commit that made it; it is in the file when this returns.

        Raises:
            OptionError: it cannot be written; or another process has begun a run with other options in the folder.
        """
        record = replace(record, commit=self.header["environment"].get("commit"))
        if self.folder is not None:
            if not self._is_ours:  # a run without records is there for the taking, also while this one made its first
                _check_options(self.folder, self.header["options"])
                self._is_ours = True
            _append(self.folder / self.name, (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode())
        self.records.append(record)


def write_json(file: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_atomically(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _RECORDS.fullmatch(file.name))


def _append(file: Path, line: bytes) -> None:
    """Add a line, whole or not at all."""
    try:
        with file.open("ab", buffering=0) as out:
            before = out.seek(0, os.SEEK_END)
            try:
                disk.write(out.fileno(), line)
            except BaseException:
                out.truncate(before)
                raise
    except OSError as error:
        raise OptionError(
            f"cannot write {file}: {error}. What was made is kept: make room, and the same command goes on from there"
        ) from error


def _read(file: Path, *, mend: bool) -> list[Record]:
    """The records in a file; a broken last line is passed over, and cut off the file where it is ours to mend (another
    process may be just writing it)."""
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        write_atomically(file, whole)
    names = {entry.name for entry in fields(Record)}
    needed = {entry.name for entry in fields(Record) if entry.default is MISSING}
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if not needed <= entry.keys() <= names:
                raise ValueError("it has other fields than this version writes")
            records.append(Record(**entry))
        except (ValueError, AttributeError) as error:
            raise OptionError(f"line {number} of {file} cannot be read ({error}); start anew with --fresh") from error
    return records


def _has_rows(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
