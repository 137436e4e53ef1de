"""`kveraser eval`: all methods on held-out examples of the data tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from transformers import PreTrainedModel

from kveraser.cli import options as opt
from kveraser.cli.common import find_eraser, load, print_json, progress_bar, reported, stderr, stdout
from kveraser.cli.tables import summary_table
from kveraser.eraser import KVEraser
from kveraser.errors import OptionError
from kveraser.evaluation import PROTOCOLS, Protocol
from kveraser.evaluation.erratum import as_compared
from kveraser.evaluation.provenance import environment, eraser_facts, placement, text_digest
from kveraser.evaluation.record import Part, Record, RecordLog
from kveraser.evaluation.report import results, tables, write_report
from kveraser.evaluation.runner import DEFAULT_BUDGET, EvalOptions, default_methods, draw, evaluate
from kveraser.evaluation.summary import ASKED, OVERALL, task_names
from kveraser.files import digest
from kveraser.methods.choosing import CHOSEN
from kveraser.tasks import ChatForm, Filler, read_passages
from kveraser.tasks import tasks as all_tasks
from kveraser.tasks.document_qa import DocumentQA


def eval_command(
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "-t", help="Task, or document-qa=FILE; repeatable; default all.")
    ] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Tokens in the contexts, repeatable; default 256.")] = None,
    protocols: Annotated[
        list[str] | None, typer.Option(help="query_after or query_cached, repeatable; default both.")
    ] = None,
    methods: opt.Methods = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help=f"Recomputed tokens behind each span, for every method; repeatable; default {DEFAULT_BUDGET}."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Examples per task and length.")] = EvalOptions.limit,
    data: Annotated[
        Path | None, typer.Option(help="Also evaluate document-qa with this HotpotQA, 2WikiMultiHopQA or MuSiQue file.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text for the surroundings; default Python's documentation.")] = None,
    seed: Annotated[int, typer.Option(help="Of the examples and of the intervals.")] = EvalOptions.seed,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = EvalOptions.max_new_tokens,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the model's chat template, as instruct models want it.")
    ] = EvalOptions.chat,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results, examples, tables and plots.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, whatever is in the folder.")] = False,
    part: Annotated[
        str | None,
        typer.Option(help="Make only this part of the examples, such as 2/4, beside other processes; needs --output."),
    ] = None,
    per_task: Annotated[bool, typer.Option("--per-task", help="Also print a table for every task.")] = False,
    model: opt.Model = opt.DEFAULT_MODEL,
    eraser: opt.Eraser = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    as_json: opt.Json = False,
) -> None:
    """Compare methods on the same held-out examples, asked after the erase and with the question cached.

    Without --methods every registered method but auto is compared, all at the same number of recomputed tokens (several of them give curves).
    The baselines among them: no-erase; erratum (the cache is kept, and a line that takes the spans back is appended); delete-and-erratum (by -M alone, on the task replaced: deleted, and the new text appended); kveraser:repair=0,
    which without a trained eraser is "hidden in place" (nothing sees the spans, nothing is recomputed); attention-guided-repair,
    "readers without steering" (the spans are cut out, their readers recomputed).

    With --output, a run that was interrupted goes on where it stopped when the same command is given again. --part 1/4 to
    --part 4/4 share one run among four processes; the command without it then makes what is missing, and the tables.
    Parts keep no times: the other processes would be in them. Results whose examples are not beside them, as in a clone, are kept:
    give --fresh, or delete results.json, to make them anew.

    KL: distance to full recomputation in nats per token of its answer, with its 95 % interval; KL ratio: over that of
    delete-and-shift; kveraser minus it: below zero where kveraser is nearer; top-1: share of tokens predicted alike; EM, F1,
    leak: of the answers; quote: of the answers to a request for what was taken back (asked when erratum is compared); margin: how much likelier the erased answer is than by full recomputation; run, ms: the cost.

    Example: kveraser eval --limit 5 -t needle -t injection -M kveraser -M local-suffix-repair:tokens=64 --output results
    """
    with reported(as_json):
        if methods and tokens:
            raise OptionError(
                "--tokens is for when no --methods are named; write it with the method: -M local-suffix-repair:tokens=64"
            )
        chosen = [as_compared(name) for name in methods or ()] or default_methods(tokens or (DEFAULT_BUDGET,))
        wanted = [*(tasks or all_tasks()), *([f"{DocumentQA.name}={data}"] if data else ())]
        asked = cast("tuple[Protocol, ...]", tuple(protocols or PROTOCOLS))

        share = Part.read(part) if part else None
        if share and output is None:
            raise OptionError(f"--part {part} needs --output, where the parts come together")
        if share and fresh:
            raise OptionError(
                f"--fresh with --part {part} would delete what the other parts have made: they share a folder; "
                "empty it before the first of them"
            )
        options = EvalOptions(
            tuple(wanted), tuple(lengths or (256,)), asked, tuple(chosen), limit, seed, max_new_tokens, chat
        )  # what is wrong with the options is said before anything is loaded
        passages = read_passages(text)
        backbone, tokenizer = load(model, device, dtype, quiet=as_json)
        if chat:
            ChatForm(tokenizer)  # what is wrong with its template is said before anything is written
        tool = find_eraser(eraser, backbone)
        header = _header(options, model, backbone, tool, passages)
        log = RecordLog(header, output, fresh, share)
        filler = Filler(passages, lambda part: len(tokenizer.encode(part, add_special_tokens=False)))
        examples = draw(options, filler)
        if share:
            examples = share.of(examples)
        places = {(drawn.task, drawn.length, drawn.index) for drawn in examples}

        def made() -> int:
            return sum(record.key[:3] in places for record in log.records)

        total = len(examples) * len(options.protocols) * len(options.methods)
        try:
            with progress_bar() as bar:
                work = bar.add_task("evaluating", total=total, completed=made())

                def keep(record: Record) -> None:
                    log.add(replace(record, milliseconds=None) if share else record)
                    bar.advance(work)

                evaluate(backbone, tokenizer, tool, options, examples, keep, list(log.records))
        except KeyboardInterrupt:
            if output is not None:
                if not share:
                    write_report(output, header, log.records, complete=False)
                stderr.print(f"{made()} of {total} are in {output}; the same command goes on from there")
            raise
        if share and output is not None:
            if as_json:
                print_json({"part": part, "file": str(output / log.name), "records": made()})
            stderr.print(f"part {part} is in {output / log.name}; the command without --part makes the tables")
            return
        if output is not None:
            write_report(output, header, log.records, complete=True)
        document, rows = results(header, log.records, complete=True)
        if as_json:
            print_json(document)
            return
        for task, length, protocol, found in tables(rows, [OVERALL, *(task_names(rows) if per_task else ())]):
            stdout.print(f"\n[bold]{task}[/], about {length} tokens, {ASKED[protocol]} ({found[0].examples} examples)")
            stdout.print(summary_table(found))
        if output is not None:
            stdout.print(f"\n[dim]tables, plots and every example are in {output}[/]")


def _header(
    options: EvalOptions, name: str, model: PreTrainedModel, eraser: KVEraser | None, passages: list[str]
) -> dict[str, Any]:
    """What identifies a run, and where it is made."""
    facts = eraser_facts(eraser)
    files = [Path(task.partition("=")[2]) for task in options.tasks if "=" in task]
    return {
        "format": 1,
        "options": {
            **options.as_dict(),
            "model": name,
            **placement(model),
            "eraser": facts and {name: facts[name] for name in ("sha256", "window", "repair")},
            "readers": CHOSEN,
            "text": text_digest(passages),
            "files": {file.name: digest(file) for file in files},
        },
        "environment": environment(model),
        "eraser": facts,
    }
