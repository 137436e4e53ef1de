"""Natural text to surround the spans with.

Knows: text files, sentences, a tokenizer's counts. Does not know what the text is for.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kveraser.errors import OptionError
from kveraser.tasks.splits import Split

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MIN_PASSAGES = 6


class Filler:
    """Passages of text, each a list of sentences; every third one is kept for evaluation.

    Args:
        passages: running text, any number of sentences each.
        count: text -> number of tokens.

    Raises:
        OptionError: too little text.
    """

    def __init__(self, passages: Iterable[str], count: Callable[[str], int]) -> None:
        split = [[s for s in _SENTENCE.split(" ".join(text.split())) if 20 < len(s) < 400] for text in passages]
        self._passages = [sentences for sentences in split if sentences]
        self._count = count
        if len(self._passages) < _MIN_PASSAGES:
            raise OptionError(
                f"the text has {len(self._passages)} usable passages, at least {_MIN_PASSAGES} are needed; "
                "give a longer one, with blank lines between its passages"
            )

    def text(self, rng: random.Random, tokens: int, split: Split) -> str:
        """About `tokens` tokens of whole sentences from passages of the split; at least one sentence."""
        pieces: list[str] = []
        left = tokens
        while left > 0 or not pieces:
            index = rng.randrange(len(self._passages))
            if (index % 3 == 2) != (split == "eval"):
                continue
            for sentence in self._passages[index]:
                if left <= 0 and pieces:
                    break
                pieces.append(sentence)
                left -= self._count(sentence)
        return " ".join(pieces)


def read_passages(path: str | Path | None = None) -> list[str]:
    """Passages of a `.txt` (blank lines between), a `.json` list of `{"text": ...}`, or a folder of text files.

    Without a path: the documentation text of Python's own standard library, which every installation has.

    Raises:
        OptionError: no such file, or nothing readable in it.
    """
    if path is None:
        return _standard_library()
    source = Path(path)
    if not source.exists():
        raise OptionError(f"there is no text source {source}")
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    passages: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"cannot read {file}: {error}") from error
        if file.suffix == ".json":
            passages += [str(entry["text"]) for entry in json.loads(text)]
        else:
            passages += re.split(r"\n\s*\n", text)
    if not passages:
        raise OptionError(f"{source} holds no text")
    return passages


def _standard_library() -> list[str]:
    from pydoc_data.topics import topics

    passages = [part for topic in sorted(topics) for part in re.split(r"\n\s*\n", topics[topic])]
    return [part for part in passages if "::" not in part and part.count(".") >= 1 and len(part) > 120]
