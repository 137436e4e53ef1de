"""Where running text comes from.

Knows: text files, folders, data sets. Does not know what the text is for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kveraser.errors import OptionError

_BLANK_LINE = re.compile(r"\n\s*\n")
_SUFFIXES = (".txt", ".md", ".json", ".jsonl")
_HUB_PASSAGES = 20_000


def read_passages(source: str | Path | None = None) -> list[str]:
    """Passages of running text.

    Args:
        source: a `.txt` or `.md` file (blank lines between passages); a `.json` list or `.jsonl` file of strings or of
            `{"text": ...}`; a folder of such files; or `hf:DATASET[@CONFIGURATION][:SPLIT[:COLUMN]]`, a Hugging Face data set (needs
            the package `datasets`; its first 20,000 rows). None: the documentation text of Python's own standard
            library, which every installation has.

    Raises:
        OptionError: no such source, not readable, or no text in it.
    """
    if source is None:
        return _standard_library()
    if str(source).startswith("hf:"):
        passages = _data_set(str(source))
    else:
        path = Path(source)
        if not str(source) or not _exists(path):  # of no name is not here
            raise OptionError(f"there is no text source {_in_short(source)}; give a file, a folder or hf:DATASET")
        files = sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES) if path.is_dir() else [path]
        passages = [passage for file in files for passage in _file(file)]
    passages = [passage for passage in passages if passage.strip()]
    if not passages:
        raise OptionError(f"{source} holds no text; give a .txt, .md, .json or .jsonl file, or a folder of them")
    return passages


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text where its source belongs is no name at all
        return False


def _in_short(source: str | Path) -> str:
    text = str(source)
    return repr(text if len(text) <= 100 else f"{text[:97]}...")


def _file(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return [_text(entry) for entry in json.loads(text)]
        if file.suffix == ".jsonl":
            return [_text(entry) for entry in json_lines(text)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"cannot read {file}: {type(error).__name__}: {error}") from error
    return _BLANK_LINE.split(text)


def json_lines(text: str) -> list[Any]:
    """The documents of JSON lines; only a line feed ends one, whatever separators its texts have."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _text(entry: object) -> str:
    if isinstance(entry, dict):
        return str(entry["text"])
    if isinstance(entry, str):
        return entry
    raise TypeError(f"expected a string or an object with a key 'text', found {type(entry).__name__}")


def _data_set(source: str) -> list[str]:
    _, named, *rest = source.split(":")
    name, _, configuration = named.partition("@")
    split, column = [*rest, *("train", "text")[len(rest) :]][:2]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise OptionError(f"{source} needs the package datasets; install it with: pip install datasets") from error
    try:
        rows = load_dataset(name, configuration or None, split=split, streaming=True).take(_HUB_PASSAGES)
        return [str(row[column]) for row in rows]
    except Exception as error:  # the package raises many kinds: no such name, no network, no such column
        raise OptionError(f"cannot read {source} (hf:DATASET[@CONFIGURATION][:SPLIT[:COLUMN]]): {error}") from error


def _standard_library() -> list[str]:
    from pydoc_data.topics import topics

    passages = [part for topic in sorted(topics) for part in _BLANK_LINE.split(topics[topic])]
    return [part for part in passages if "::" not in part and part.count(".") >= 1 and len(part) > 120]
