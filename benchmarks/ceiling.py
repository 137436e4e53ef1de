"""What training could add to the neutral eraser: states fitted freely to one context, judged by what the fit never asked.

    python benchmarks/ceiling.py [--model smollm2-135m-instruct] [-t needle] [--contexts 8] [--tokens 256-448] [--repair 0 --repair 16
                                 --repair 64] [--arm span] [--steps 12] [--json] [--output FOLDER]

A context of training tasks; the neutral eraser erases its first span and recomputes the readers, as an erase does it. From there Adam fits

    span       keys and values of the span's slots, which an eraser that steers spans would write
    readers    those of the recomputed readers, which learned repair would write
    both

in every layer, not bound to any rank, nor to what a causal pass could know, to KL(full recomputation || erased) of *fit queries*:
other questions and running text. Judged are queries of the same context that the fit never saw, the span's own question and other
text, asked after the erase, or with the span's question cached. `fitted` is where the fit is best (neutral itself, where nothing is
better on these queries); `best stop` is the least KL on the span's question at any of the looks, which only an oracle could choose.

The gap is closed in all arms, as the neutral eraser has it. Faint keys (a tenth of the neutral ones, values zero) are where a span
starts, since neutral ones have no gradient. With the question cached all but its last token is there when the span is erased.

No strict bound: a few steps and half a dozen queries find one good fit of many, and training, which learns from other contexts what
is asked of their spans, may find one that carries further. It tells how much room the states have, and how much of a fit carries over.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from measuring import report_table
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kveraser as kv
from kveraser.cli.common import progress_bar
from kveraser.eraser import default_eraser
from kveraser.evaluation.compare import PROTOCOLS, Protocol
from kveraser.evaluation.metrics import kl_divergence
from kveraser.evaluation.provenance import environment, placement
from kveraser.files import write_atomically
from kveraser.model.attention import for_packing
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.model.view import causal_lm, model_device
from kveraser.readers import Calibration, Turning, calibrate
from kveraser.tasks import EraseExample, Filler, Sizes, as_task, tasks
from kveraser.training.cases import Case, Prefilled, prefill
from kveraser.training.lessons import Encode, Erase, Lesson, Probe, encoder, join_examples, read_filler
from kveraser.training.prepared import target_states, teach
from kveraser.training.rereading import Repairing, repair_of, reread
from kveraser.training.rows import Segment, States, places_of, run_row, slot_range

Arm = Literal["span", "readers", "both"]
ARMS: tuple[Arm, ...] = ("span", "readers", "both")
JUDGED = 2
"""Probes of a case that the fit never sees, its first ones: the span's own question, and other text."""
SPACING, STRANGERS, TEXT = 150, 1, 16
FAINT, SPAN_FASTER = 0.1, 10.0
LOOKS = 3


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        tasks: of which contexts are made; none: all that erasers are trained on.
        tokens: the least and the most of a context, roughly.
        steps, rate: of Adam; the unit of the rate is how much the context's own states differ.
    """

    tasks: tuple[str, ...] = ()
    tokens: tuple[int, int] = (256, 448)
    steps: int = 12
    rate: float = 0.005
    seed: int = 0


def draw(plan: Plan, number: int, filler: Filler, encode: Encode) -> tuple[str, Lesson]:
    """A task, and a lesson of the training split in which the one span of its example is erased, with the same probes behind the
    context and behind the span's question."""
    rng = random.Random(f"ceiling/{plan.seed}/{number}")
    least, most = plan.tokens
    tokens = int(least * (most / least) ** rng.random())
    count = max(round(tokens / SPACING), 2)
    around = max(tokens // count - 64, 12)
    names = plan.tasks or [name for name, task in tasks().items() if task.trained]

    def make(name: str | None = None) -> tuple[str, EraseExample]:
        task = as_task(name or rng.choice(names))
        return task.name, task.make(rng, filler, Sizes(around, around), "train")

    def text() -> Probe:
        ids = tuple(encode(filler.sentence(rng, "train"))[:TEXT])
        return Probe(ids[:-1], ids[1:], kind="continuation")

    def question(example: EraseExample) -> Probe:
        words = tuple(encode(f"{example.gap}{example.answer}"))
        return Probe((*encode(example.question), *words[:-1]), words, kind="other")

    (name, first), *others = (make() for _ in range(count))
    while first.further:
        name, first = make()
    written = [first, *(example for _, example in others)]
    lesson = join_examples(rng, written, encode, {"cue": 1.0, "continuation": 1.0})
    strangers = [make(name)[1] for _ in range(STRANGERS)]
    probes = (replace(question(first), kind="query_after"), text(), *map(question, (*written[1:], *strangers)), text(),
              *lesson.erases[0].probes)  # fmt: skip
    asked = lesson.questions[0]
    own = replace(probes[0], ids=probes[0].ids[len(asked) - 1 :], cached=0, kind="query_cached")
    behind = [replace(probe, ids=(asked[-1], *probe.ids), cached=0) for probe in probes[1:]]
    return name, Lesson(lesson.ids, (Erase(lesson.erases[0].spans, (*probes, own, *behind)),), (asked,))


@dataclass(frozen=True)
class Queries:
    """What is asked of a case, and what full recomputation says: logits `(tokens, vocab)`."""

    probes: tuple[Probe, ...]
    teacher: Tensor

    def kl(self, model: nn.Module, past: Sequence[States], end: int) -> list[Tensor]:
        """KL(full recomputation || these states) per token of each probe; `end` is the position of the next token."""
        sees = slot_range(0, sum(int(piece[0][0].shape[-2]) for piece in past))
        row = [Segment.run(probe.ids, end, sees) for probe in self.probes]
        hidden, _ = run_row(model, row, past)
        states = target_states(hidden, [place.end for place in places_of(row)], self.probes)
        student = causal_lm(model).get_output_embeddings()(states)
        return list(kl_divergence(self.teacher, student).split([len(probe.targets) for probe in self.probes]))


@dataclass(frozen=True)
class Erased:
    """A case after the neutral erase, keys as if there were no gap.

    Attributes:
        kept: states of all that was neither erased nor recomputed.
        readers: of what was recomputed.
        span: faint ones in the span's slots, where a fit begins; the neutral erase shows none.
        end: position of the next token.
    """

    kept: States
    readers: States
    span: States
    end: int

    def parts(self, arm: Arm) -> tuple[list[States], list[tuple[States, float]]]:
        """What stays, and what is free, each with how many times faster it is moved than readers are."""
        span, readers = (self.span, SPAN_FASTER), (self.readers, 1.0)
        if arm == "both":
            return [self.kept], [readers, span]
        return ([self.kept, self.readers], [span]) if arm == "span" else ([self.kept], [readers])


@torch.no_grad()
def erase(model: nn.Module, prefilled: Prefilled, case: Case, repair: int, calibration: Calibration) -> Erased:
    """Erase the span of a case with the neutral eraser."""
    wanted = repair_of(model, prefilled, case, Repairing(repair, calibration))
    again = reread(model, prefilled, [case], [wanted])
    (span,), device = case.erase.spans, model_device(model)
    before, stays = case.slots[: span.start].to(device), ~torch.isin(again.behind[0], again.readers[0]).to(device)
    kept = [
        (
            torch.cat([keys[:, :, before], closed[0][:, :, stays]], -2),
            torch.cat([values[:, :, before], closed[1][:, :, stays]], -2),
        )
        for (keys, values), closed in zip(prefilled.states, again.closed, strict=True)
    ]
    end = len(case.slots) - int(again.gone[0][-1])
    turns = Turning.of(model).at(torch.tensor([end - 1], device=device))
    faint = []
    for index, (keys, values) in enumerate(kept):
        key = turns.to_place(FAINT * calibration.neutral[index, :, None].to(keys), index)
        faint.append(
            (key[None].expand(-1, -1, len(span), -1), torch.zeros_like(values[:, :, :1]).expand(-1, -1, len(span), -1))
        )
    return Erased(kept, again.states, faint, end)


@dataclass(frozen=True)
class Trial:
    """A case, and what it is asked: to fit, and to judge."""

    case: Case
    fit: Queries
    judged: Queries

    @classmethod
    def all(cls, model: nn.Module, prefilled: Prefilled) -> list[Trial]:
        """Of every case."""
        with torch.no_grad():
            teacher = causal_lm(model).get_output_embeddings()(teach(model, prefilled))
        found = []
        for case in prefilled.cases:
            judged, fit = case.probes[:JUDGED], case.probes[JUDGED:]
            marks = [sum(len(probe.targets) for probe in part) for part in (judged, fit)]
            first, second, teacher = teacher.split([*marks, len(teacher) - sum(marks)])
            found.append(cls(case, Queries(fit, second), Queries(judged, first)))
        return found

    @torch.no_grad()
    def look(self, model: nn.Module, past: Sequence[States], end: int, fit: float | None = None) -> dict[str, float]:
        """Mean KL on the fit queries (if it is not known), the span's own question, and other text."""
        known = torch.cat(self.fit.kl(model, past, end)).mean().item() if fit is None else fit
        question, text = (each.mean().item() for each in self.judged.kl(model, past, end))
        return {"fit": known, "question": question, "text": text}


def fit_freely(model: nn.Module, erased: Erased, arm: Arm, plan: Plan, trial: Trial) -> list[dict[str, float]]:
    """Fit an arm's states by Adam, in units of how much the context's own states differ; what was seen at each look."""
    fixed, start = erased.parts(arm)
    units = [[part.std(-2, keepdim=True).mean(-1, keepdim=True) for part in pair] for pair in erased.kept]
    free = [
        [[torch.zeros(part.shape).to(part).requires_grad_() for part in pair] for pair in piece] for piece, _ in start
    ]
    groups = [
        {"params": [part for pair in piece for part in pair], "lr": plan.rate * faster}
        for piece, (_, faster) in zip(free, start, strict=True)
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)

    def past() -> list[States]:
        moved: list[States] = []
        for (piece, _), steps in zip(start, free, strict=True):
            moved.append(
                [
                    (keys + by[0] * unit[0], values + by[1] * unit[1])
                    for (keys, values), by, unit in zip(piece, steps, units, strict=True)
                ]
            )
        return [*fixed, *moved]

    every, seen = max(plan.steps // LOOKS, 1), []
    for step in range(plan.steps):
        optimizer.zero_grad()
        now = past()
        loss = torch.cat(trial.fit.kl(model, now, erased.end)).mean()
        loss.backward()
        if step % every == 0:
            seen.append({"step": step, **trial.look(model, now, erased.end, loss.item())})
        optimizer.step()
        falling.step()
    return [*seen, {"step": plan.steps, **trial.look(model, past(), erased.end)}]


Key = tuple[int, Protocol, int, Arm]


def key_of(row: dict[str, Any]) -> Key:
    """What tells rows apart."""
    return row["context"], row["protocol"], row["repair"], row["arm"]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, wanted: Sequence[Key], calibration: Calibration,
    filler: Filler,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each of what is wanted: `(context, protocol, repair, arm)`, those of a context one behind the other."""
    base, encode = for_packing(model), encoder(tokenizer)
    for number, members in groupby(wanted, key=lambda key: key[0]):
        task, lesson = draw(plan, number, filler, encode)
        prefilled = prefill(base, [lesson])
        trials = dict(zip(PROTOCOLS, Trial.all(base, prefilled), strict=True))
        for (protocol, repair), arms in groupby(members, key=lambda key: key[1:3]):
            trial = trials[protocol]
            erased = erase(base, prefilled, trial.case, repair, calibration)
            neutral = trial.look(base, [erased.kept, erased.readers], erased.end)
            about = {
                "context": number, "task": task, "tokens": len(trial.case.slots), "erased": len(trial.case.erase.spans[0]),
                "readers": int(erased.readers[0][0].shape[-2]), "protocol": protocol, "repair": repair, "neutral": neutral,
            }  # fmt: skip
            for *_, arm in arms:
                looks = fit_freely(base, erased, arm, plan, trial)
                fitted = min((neutral, *looks), key=lambda each: each["fit"])
                best = min(each["question"] for each in (neutral, *looks))
                yield {**about, "arm": arm, "fitted": fitted, "best_stop": best, "looks": looks}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fitted over neutral, of the means and in the median, and the share of contexts that got better."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["repair"], ARMS.index(row["arm"]), row["protocol"])):
        groups.setdefault((row["repair"], row["arm"], row["protocol"]), []).append(row)
    found = []
    for (repair, arm, protocol), members in groups.items():
        entry: dict[str, Any] = {"repair": repair, "arm": arm, "protocol": protocol, "contexts": len(members)}
        for what in ("fit", "question", "text"):
            neutral, fitted = ([row[state][what] for row in members] for state in ("neutral", "fitted"))
            entry[what] = {
                "neutral": statistics.mean(neutral), "fitted": statistics.mean(fitted),
                "ratio": _ratio(sum(fitted), sum(neutral)),
                "median_ratio": statistics.median(map(_ratio, fitted, neutral)),
                "better": statistics.mean(after < before for after, before in zip(fitted, neutral, strict=True)),
            }  # fmt: skip
        best, whole = (
            sum(values)
            for values in zip(*((row["best_stop"], row["neutral"]["question"]) for row in members), strict=True)
        )
        found.append({**entry, "best_stop_ratio": _ratio(best, whole)})
    return found


def _ratio(after: float, before: float) -> float:
    """One KL over another; both are zero up to rounding where there is nothing to gain."""
    return after / before if before > 1e-7 else 1.0


def show(found: Sequence[dict[str, Any]]) -> Table:
    """The summary as a table."""
    table = Table("readers", "free", "asked", "contexts", "fit queries", "span's question", "ratio; median", "better", "best stop",
                  "other text", "ratio; median", "better", title="KL of neutral -> fitted states, nats per token")  # fmt: skip
    for entry in found:
        fit, question, text = (entry[what] for what in ("fit", "question", "text"))
        table.add_row(
            str(entry["repair"]), entry["arm"], entry["protocol"].removeprefix("query_"), str(entry["contexts"]), _change(fit),
            _change(question), f"{question['ratio']:.2f}; {question['median_ratio']:.2f}", f"{question['better']:.0%}",
            f"{entry['best_stop_ratio']:.2f}", _change(text), f"{text['ratio']:.2f}; {text['median_ratio']:.2f}", f"{text['better']:.0%}",
        )  # fmt: skip
    return table


def _change(of: dict[str, float]) -> str:
    return f"{of['neutral']:.4f} -> {of['fitted']:.4f}"


def _lengths(text: str) -> tuple[int, int]:
    """Two numbers from `LEAST-MOST`."""
    least, dash, most = text.partition("-")
    if not (dash and least.isdigit() and most.isdigit() and 64 <= int(least) <= int(most)):
        raise typer.BadParameter(f"{text!r} must be two lengths of at least 64 tokens, such as 256-448")
    return int(least), int(most)


def main(
    model_name: Annotated[str, typer.Option("--model", help="The backbone.")] = DEFAULT_BACKBONE,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of training tasks.")] = 8,
    tokens: Annotated[str, typer.Option(help="Length of the shortest and of the longest.")] = "256-448",
    task: Annotated[
        list[str] | None, typer.Option("-t", "--task", help="Tasks; default all that erasers are trained on.")
    ] = None,
    repair: Annotated[list[int] | None, typer.Option(min=0, help="Readers to recompute; default 0, 16 and 64.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="What is free: span, readers or both; default each of them.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of Adam.")] = Plan.steps,
    rate: Annotated[
        float, typer.Option(min=0, help="Of Adam; the unit is how much the context's own states differ.")
    ] = Plan.rate,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = Plan.seed,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for ceiling.json; the same command goes on from there.")
    ] = None,
) -> None:
    """Fit states freely to contexts, one by one, and print how much better than neutral they are on other queries.

    Example: python benchmarks/ceiling.py --contexts 4 --repair 16 --arm readers --output ceilings
    """
    if unknown := set(task or ()) - {name for name, kind in tasks().items() if kind.trained}:
        raise typer.BadParameter(f"no eraser is trained on a task {min(unknown)!r}; see `kveraser eval --help`")
    if unknown := set(arm or ()) - set(ARMS):
        raise typer.BadParameter(f"there is no arm {min(unknown)!r}; there are: {', '.join(ARMS)}")
    arms = [each for each in ARMS if not arm or each in arm]
    plan = Plan(tuple(task or ()), _lengths(tokens), steps, rate, seed)
    settings = {"model": model_name, "tokens": list(plan.tokens), "steps": steps, "rate": rate, "seed": seed,
                **({"tasks": task} if task else {})}  # fmt: skip
    file = output / "ceiling.json" if output else None
    rows: list[dict[str, Any]] = []
    if file is not None and file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["settings"] != settings:
            raise SystemExit(f"{file} is of another run ({earlier['settings']}); give another --output, or delete it")
        rows = earlier["rows"]
    have = set(map(key_of, rows))
    pairs = [(many, each) for many in dict.fromkeys(repair or (0, 16, 64)) for each in arms if many or each == "span"]
    if not pairs:
        raise typer.BadParameter("with --repair 0 there are no readers; give --arm span, or --repair 16")
    wanted = [
        key for number in range(contexts) for protocol in PROTOCOLS for pair in pairs
        if (key := (number, protocol, *pair)) not in have
    ]  # fmt: skip
    model, tokenizer = kv.load_backbone(model_name, dtype="fp32")
    filler = read_filler(tokenizer, None)
    calibration = default_eraser(model).calibration
    if calibration is None:
        calibration = calibrate(model, encoder(tokenizer)(filler.text(random.Random(seed), 2000, "train"))[:2000])

    def document() -> dict[str, Any]:
        about = {"benchmark": "ceiling", **environment(model), **placement(model), "settings": settings}
        return {**about, "summary": summary(rows), "rows": rows}

    with progress_bar() as bar:
        work = bar.add_task("fitting", total=len(wanted))
        for row in measure(model, tokenizer, plan, wanted, calibration, filler):
            rows.append(row)
            bar.advance(work)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(document(), indent=2).encode())
    report_table("ceiling", document(), show(summary(rows)), output, as_json)


if __name__ == "__main__":
    typer.run(main)
