"""Document QA: long documents, one of them with a passage that states a wrong answer.

From a file of HotpotQA, 2WikiMultiHopQA or MuSiQue, the questions are the file's; without one, they are clozes on the
surrounding text itself, so that a model can be trained for it on any text.

The wrong passage of a file's question is one that its answer needs, with the answer of another question instead of its own. Where no such
passage has the answer in whole words, and for yes or no, it is the question with the wrong answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kveraser.errors import OptionError
from kveraser.tasks.answers import normalise, says
from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, ask, halves
from kveraser.tasks.sources import json_lines

_VALUE = re.compile(r"(?<=[a-z,] )(\d{2,4}|(?!The |An? )(?:[A-Z][a-z]+ ?){1,3}(?<! ))(?=[ ,.])")
_YES_OR_NO = "yes or no"
_QUESTIONS = halves(
    [
        "What does the document say here?",
        "Which words are missing in this sentence of the document?",
        "How does this sentence of the text go on?",
    ]
)


@dataclass(frozen=True)
class Document:
    """A question over passages: `(title, text, whether the answer needs it)`."""

    question: str
    answer: str
    passages: tuple[tuple[str, str, bool], ...]


def read_documents(path: Path) -> list[Document]:
    """Questions of a HotpotQA or 2WikiMultiHopQA file (`context`, `supporting_facts`) or a MuSiQue one (`paragraphs`).

    Raises:
        OptionError: no such file, not of these formats, or without a question.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if text.lstrip().startswith("[") else json_lines(text)
        documents = [_document(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise OptionError(
            f"{path} cannot be read as a HotpotQA, 2WikiMultiHopQA or MuSiQue file: {type(error).__name__}: {error}"
        ) from error
    if not documents:
        raise OptionError(f"{path} holds no question; give a file of HotpotQA, 2WikiMultiHopQA or MuSiQue")
    return documents


def _document(entry: dict[str, Any]) -> Document:
    if "paragraphs" in entry:
        passages = [(p["title"], p["paragraph_text"], bool(p.get("is_supporting"))) for p in entry["paragraphs"]]
    else:
        needed = {title for title, _ in entry["supporting_facts"]}
        passages = [(title, "".join(sentences).strip(), title in needed) for title, sentences in entry["context"]]
    return Document(str(entry["question"]), str(entry["answer"]), tuple(passages))


class DocumentQA(Task):
    """The erased span is a passage that says the wrong thing; the right one stays in the documents."""

    name = "document-qa"
    summary = "long documents with a passage that states a wrong answer"
    takes_source = True

    def __init__(self, source: Path | None = None) -> None:
        super().__init__(source)
        self._documents = None if source is None else read_documents(source)

    def examples(self, filler: Filler, sizes: Sizes, split: Split, seed: int) -> Iterator[EraseExample]:
        if self._documents is None:
            yield from super().examples(filler, sizes, split, seed)
            return
        if split == "train":
            raise OptionError("a file of questions is for evaluation only; train document-qa without one")
        rng = random.Random(f"{self.name}/{seed}")
        for document in self._documents:
            yield _with_wrong_passage(rng, document, self._documents, filler, sizes)

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        before, behind = sizes.draw(rng)
        prefix, suffix = filler.text(rng, before, split), filler.text(rng, behind, split)
        found = None
        for _ in range(20):
            sentence = filler.sentence(rng, split)
            found = next((m for m in _VALUE.finditer(sentence) if m.start() > 25), None)
            other = next((m.group() for m in _VALUE.finditer(filler.sentence(rng, split)) if m.group()[0].isdigit()
                          == (found is not None and found.group()[0].isdigit())), None)  # fmt: skip
            if found and other and other not in sentence:
                break
        else:
            sentence, other = "The town hall was built by the brothers Wagner in 1871.", "1902"
            found = re.search("1871", sentence)
        assert found is not None
        wrong = sentence[: found.start()] + other + sentence[found.end() :]
        if rng.random() < 0.5:
            prefix = f"{prefix} {sentence} {filler.text(rng, 16, split)}"
        else:
            suffix = f"{filler.text(rng, 16, split)} {sentence} {suffix}"
        return EraseExample(
            prefix=f"{prefix}\n\n",
            span=f"{wrong} {filler.text(rng, 16, split)}\n\n" if rng.random() < 0.5 else f"{wrong}\n\n",
            suffix=suffix,
            question=ask(rng.choice(_QUESTIONS(split)), sentence[: found.start()].strip()),
            gold=found.group(),
            erased=other,
            continuation=" " + filler.text(rng, 24, split),
        )


def _with_wrong_passage(
    rng: random.Random, document: Document, others: list[Document], filler: Filler, sizes: Sizes
) -> EraseExample:
    wrong = _wrong_answer(rng, document, others)
    needed = [entry for entry in document.passages if entry[2]]
    rest = [entry for entry in document.passages if not entry[2]]
    answer = re.compile(rf"(?<!\w){re.escape(document.answer)}(?!\w)")
    said = [] if _kind(document.answer) == _YES_OR_NO else [text for _, text, _ in needed if answer.search(text)]
    harmful = answer.sub(lambda _: wrong, said[0]) if said else f"{document.question} The answer is {wrong}."
    before, behind = sizes.draw(rng)
    budget = before + behind - sum(filler.count(text) for _, text, _ in needed)
    chosen = list(needed)
    for entry in rest:
        if budget <= 0:
            break
        chosen.append(entry)
        budget -= filler.count(entry[1])
    rng.shuffle(chosen)
    at = rng.randint(1, len(chosen) - 1) if len(chosen) > 1 else 1
    texts = [f"{title}: {text}\n\n" for title, text, _ in chosen]
    return EraseExample(
        prefix="".join(texts[:at]),
        span=f"{harmful}\n\n",
        suffix="".join(texts[at:]).rstrip(),
        question=ask(document.question),
        gold=document.answer,
        erased=wrong,
    )


def _wrong_answer(rng: random.Random, document: Document, others: list[Document]) -> str:
    """The answer of another question, of the same kind if there is one, which says something else than the right one, and no part or
    extension of it: else the right answer would be a leak, or the wrong passage say it."""
    right, kind = document.answer, _kind(document.answer)

    def differs(answer: str) -> bool:
        return normalise(answer) != normalise(right) and not says(answer, right) and not says(right, answer)

    differing = [d.answer for d in others if differs(d.answer)]
    if not differing:
        raise OptionError(f"there is no answer that differs from {right!r}; give a file with more questions")
    # Drawn from answers that say the same, too, so that a seed draws for all other questions what it always drew.
    drawn = rng.choice([d.answer for d in others if _kind(d.answer) == kind and d != document]
                       or [d.answer for d in others if d.answer != right])  # fmt: skip
    return drawn if differs(drawn) else min(differing, key=lambda answer: _kind(answer) != kind)


def _kind(answer: str) -> str:
    if answer.lower() in ("yes", "no"):
        return _YES_OR_NO
    return "number" if answer[:1].isdigit() else "words"
