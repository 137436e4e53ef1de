"""Every method on the same held-out examples: tasks, context lengths, protocols.

Knows: tasks, contexts, comparing, scoring. Does not know about files, intervals or tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.context import ErasableContext
from kveraser.eraser import KVEraser
from kveraser.errors import OptionError
from kveraser.evaluation.compare import PROTOCOLS, MethodResult, Protocol, compare_methods, read_parts
from kveraser.evaluation.erratum import Errata, Erratum
from kveraser.evaluation.metrics import exact_match, f1, leaks
from kveraser.evaluation.record import Key, Record
from kveraser.methods import EraseMethod, NoErase, method_label, methods
from kveraser.model.view import text_config
from kveraser.readers import LEAST_READERS
from kveraser.tasks import ChatForm, EraseExample, Filler, Sizes, as_task

DEFAULT_BUDGET = LEAST_READERS
"""Recomputed tokens behind each span at which methods are compared."""


def default_methods(budgets: Sequence[int] = (DEFAULT_BUDGET,)) -> list[EraseMethod]:
    """What is compared when no method is named: every registered one and the erratum, at the same numbers of recomputed tokens per span.

    Args:
        budgets: those numbers. Methods that recompute nothing, or everything, are there once, and those that then erase, too, also at 0.
    """
    found: list[EraseMethod] = []
    for kind in methods().values():
        method = kind()
        if not kind.compared:
            continue
        if kind.budget_option is None:
            found += [method, Erratum()] if kind is NoErase else [method]
            continue
        wanted = dict.fromkeys((0, *budgets) if kind.compared_at_nothing else budgets)
        found += [method.with_budget(tokens) for tokens in wanted if tokens or kind.compared_at_nothing]
    return found


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated.

    Attributes:
        tasks: names, or `name=file`.
        lengths: of the contexts, in tokens (about).
        protocols: whether the question comes after the erase, or was in the cache.
        methods: compared on the same examples.
        limit: examples per task and length.
        seed: of the examples.
        max_new_tokens: length of the answers.
        chat: ask through the model's chat template (see `tasks/chat.py`).

    Raises:
        OptionError: an unknown or repeated entry, an impossible number.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    protocols: tuple[Protocol, ...]
    methods: tuple[EraseMethod, ...]
    limit: int = 10
    seed: int = 0
    max_new_tokens: int = 16
    chat: bool = False

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise OptionError(f"there is no protocol {protocol!r}; there are: {', '.join(get_args(Protocol))}")
        for name in self.tasks:
            as_task(name)
        shown = self.as_dict()
        for what in ("tasks", "lengths", "protocols", "methods"):
            if not shown[what]:
                raise OptionError(f"there is nothing to evaluate: no {what}")
            if twice := {str(entry) for entry in shown[what] if shown[what].count(entry) > 1}:
                raise OptionError(f"given twice in {what}: {', '.join(sorted(twice))}")
        if min(self.limit, self.max_new_tokens, *self.lengths) < 1:
            raise OptionError(f"limit, max_new_tokens and lengths must be at least 1: {shown}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tasks": [task_label(name) for name in self.tasks],
            "lengths": list(self.lengths),
            "protocols": list(self.protocols),
            "methods": [method_label(method) for method in self.methods],
            "limit": self.limit,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            **({"chat": True} if self.chat else {}),  # left out, so that runs from before there was a chat form go on
        }


def task_label(name: str) -> str:
    """A task's name for tables, with its file's name but without its folder."""
    task, _, file = name.partition("=")
    return f"{task}={Path(file).name}" if file else task


@dataclass(frozen=True)
class Drawn:
    """An example, the `index`-th of its task and length."""

    task: str
    length: int
    index: int
    example: EraseExample


def draw(options: EvalOptions, filler: Filler) -> list[Drawn]:
    """The held-out examples of a run, the same for every method. All tasks and lengths come in turns, so that an
    interrupted run has some of each.

    Raises:
        OptionError: a method has nothing to say about the examples of a task.
    """

    def one_task(name: str, length: int) -> Iterator[Drawn]:
        examples = as_task(name).examples(filler, Sizes.context(length), "eval", options.seed)
        for index, example in enumerate(itertools.islice(examples, options.limit)):
            if not index:
                Errata.of(example, options.methods, cached=False)
            yield Drawn(task_label(name), length, index, example)

    columns = [one_task(name, length) for length in options.lengths for name in options.tasks]
    return [drawn for row in itertools.zip_longest(*columns) for drawn in row if drawn is not None]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eraser: KVEraser | None,
    options: EvalOptions,
    examples: Iterable[Drawn],
    keep: Callable[[Record], None],
    known: Iterable[Record] = (),
) -> None:
    """Run every method on every example in every protocol.

    Args:
        keep: given each record as soon as there is one.
        known: records of an earlier, interrupted run, which are not made again.

    Raises:
        OptionError: contexts that are longer than the model can read, or a chat form without a chat template.
    """
    form = ChatForm(tokenizer) if options.chat else None
    room = getattr(text_config(model), "max_position_embeddings", None)
    if room is not None and max(options.lengths) > room:
        raise OptionError(f"contexts of {max(options.lengths)} tokens are too long: the model has {room} positions")
    have = {record.key for record in known}
    warm = False
    for drawn in examples:
        missing = {
            protocol: [method for method in options.methods if _key(drawn, protocol, method) not in have]
            for protocol in options.protocols
        }
        if not any(missing.values()):
            continue
        if not warm:
            _warm_up(ErasableContext(model, tokenizer, eraser), options.methods)
            warm = True
        context = ErasableContext(model, tokenizer, eraser)
        example = form([drawn.example])[0] if form else drawn.example
        spans = read_parts(context, example.parts, chat=options.chat)
        sizes = len(context), sum(map(len, spans))
        question: str | None = example.question
        for protocol in PROTOCOLS:
            cached = protocol == "query_cached"
            if cached:
                context.append(example.question)
                question = None
            if missing.get(protocol):
                compare_methods(
                    context, spans, question, missing[protocol], erased=example.erased,
                    max_new_tokens=options.max_new_tokens, ends=form.ends if form else (), gap=example.gap,
                    new=example.new, errata=Errata.of(example, options.methods, cached=cached),
                    done=partial(_score, keep, drawn, protocol, sizes),
                )  # fmt: skip


def _key(drawn: Drawn, protocol: Protocol, method: EraseMethod) -> Key:
    return drawn.task, drawn.length, drawn.index, protocol, method_label(method)


def _score(
    keep: Callable[[Record], None], drawn: Drawn, protocol: Protocol, sizes: tuple[int, int], result: MethodResult
) -> None:
    gold, erased = drawn.example.gold, drawn.example.erased
    keep(
        Record(
            task=drawn.task,
            length=drawn.length,
            index=drawn.index,
            protocol=protocol,
            method=result.method,
            used=result.used,
            tokens=sizes[0],
            tokens_erased=sizes[1],
            answer=result.answer,
            gold=gold,
            erased=erased,
            exact_match=None if gold is None else exact_match(result.answer, gold),
            f1=None if gold is None else f1(result.answer, gold),
            leaked=None if erased is None else leaks(result.answer, erased),
            leak_margin=result.leak_margin,
            kl=result.kl,
            agreement=result.agreement,
            tokens_recomputed=result.tokens_recomputed,
            residual=result.residual,
            milliseconds=result.milliseconds,
            recall=result.recall,
            recalled=None if erased is None or result.recall is None else leaks(result.recall, erased),
        )
    )


def _warm_up(context: ErasableContext, methods: Iterable[EraseMethod]) -> None:
    """Let every method erase once, so that what is set up at first use is in no one's time."""
    context.append("One two three.")
    span = context.append(" Four five six.")
    context.append(" Seven eight nine ten.")
    for method in methods:
        context.restore(context.erase(span, method))
