"""Methods on held-out examples of the data tasks, averaged.

Knows: tasks, contexts, metrics. Does not know about training or about tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.erasable import ErasableContext
from kveraser.eraser import KVEraser
from kveraser.evaluation.compare import PROTOCOLS, MethodResult, Protocol, compare_methods, read_parts
from kveraser.evaluation.metrics import exact_match, leaks
from kveraser.methods import EraseMethod
from kveraser.tasks import Filler, Sizes, as_task


@dataclass(frozen=True)
class Judged:
    """One method on one example.

    Attributes:
        task, protocol: where the example is from and how it was asked.
        result: what the method did.
        matched: whether the answer is the gold one; None without one.
        leaked: whether the answer says the erased value.
    """

    task: str
    protocol: Protocol
    result: MethodResult
    matched: bool | None
    leaked: bool


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eraser: KVEraser | None,
    names: Sequence[str],
    methods: Sequence[EraseMethod],
    filler: Filler,
    *,
    sizes: Sizes,
    limit: int,
    seed: int = 0,
    max_new_tokens: int = 8,
    done: Callable[[], None] | None = None,
) -> Iterator[Judged]:
    """Every method on the same `limit` held-out examples of each task, in both protocols."""
    for name in names:
        for example in itertools.islice(as_task(name).examples(filler, sizes, "eval", seed), limit):
            for protocol in PROTOCOLS:
                context = ErasableContext(model, tokenizer, eraser)
                parts = (example.prefix, example.span, example.suffix, example.question)
                span, question = read_parts(context, *parts, protocol)
                for result in compare_methods(context, span, question, methods, max_new_tokens=max_new_tokens):
                    matched = None if example.gold is None else exact_match(result.answer, example.gold)
                    leaked = example.erased is not None and leaks(result.answer, example.erased)
                    yield Judged(name, protocol, result, matched, leaked)
                if done:
                    done()


def averages(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One row per task (and over all of them), protocol and method: means of KL, match, leak and milliseconds."""
    rows = []
    names = list(dict.fromkeys(entry.task for entry in judged))
    for task, protocol in itertools.product([*names, "all"], PROTOCOLS):
        chosen = [entry for entry in judged if task in (entry.task, "all") and entry.protocol == protocol]
        for method in dict.fromkeys(entry.result.method for entry in chosen):
            own = [entry for entry in chosen if entry.result.method == method]
            matches = [entry.matched for entry in own if entry.matched is not None]
            rows.append(
                {
                    "task": task,
                    "protocol": protocol,
                    "method": method,
                    "examples": len(own),
                    "kl": sum(entry.result.kl for entry in own) / len(own),
                    "exact_match": sum(matches) / len(matches) if matches else None,
                    "leak": sum(entry.leaked for entry in own) / len(own),
                    "milliseconds": sum(entry.result.milliseconds for entry in own) / len(own),
                }
            )
    return rows
