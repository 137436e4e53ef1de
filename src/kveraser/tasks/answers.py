"""When two answers say the same, and when one says what another does.

Knows: strings. Does not know about tasks, models or metrics.
"""

from __future__ import annotations

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+(?:(?<=\d)[.,:](?=\d)\d+)*")  # 1,234 and 12:30 are one


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces (as SQuAD's scorer does)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def says(text: str, answer: str) -> bool:
    """Whether a text says an answer in whole words, whatever stands around them: quotation marks, a tag, a dash.

    Two readings of what a word is, since a value that must be gone counts by either: normalised, and as runs of letters and digits.
    An answer that normalises to nothing is said nowhere.
    """
    wanted = normalise(answer)
    if not wanted:
        return False
    words, of_answer = _WORD.findall(text.lower()), _WORD.findall(answer.lower())
    starts = range(len(words) - len(of_answer) + 1) if of_answer else ()
    return f" {wanted} " in f" {normalise(text)} " or any(words[i : i + len(of_answer)] == of_answer for i in starts)
