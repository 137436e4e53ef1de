"""`kveraser eval`: all methods on held-out examples of the data tasks."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from kveraser.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    EraserOption,
    JsonOption,
    ModelOption,
    find_eraser,
    load,
    print_json,
    progress_bar,
    reported,
    stdout,
)
from kveraser.cli.erase import chosen_methods
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.evaluation.heldout import averages, judge
from kveraser.tasks import Filler, Sizes, as_task, read_passages, tasks


def eval_command(
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Task, repeatable; default all.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-M", help="Method, repeatable; default all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Examples per task.")] = 10,
    prefix: Annotated[tuple[int, int], typer.Option(help="Least and most tokens before the span.")] = Sizes.prefix,
    suffix: Annotated[tuple[int, int], typer.Option(help="Least and most tokens behind the span.")] = Sizes.suffix,
    text: Annotated[str | None, typer.Option(help="Text for the surroundings; default Python's documentation.")] = None,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    model: ModelOption = DEFAULT_MODEL,
    eraser: EraserOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on the same held-out examples, asked after the erase and with the question cached.

    KL is the distance to full recomputation in nats per token of its answer; match and leak are shares of the answers.

    Example: kveraser eval --limit 5 --task needle -M kveraser -M delete-and-shift
    """
    with reported(as_json):
        names = list(task or tasks())
        for name in names:
            as_task(name)
        chosen_methods(method, True)
        passages = read_passages(text)
        backbone, tokenizer = load(model, device, dtype, quiet=as_json)
        tool = find_eraser(eraser, backbone)
        filler = Filler(passages, lambda part: len(tokenizer.encode(part, add_special_tokens=False)))
        with progress_bar() as bar:
            work = bar.add_task("judging", total=len(names) * limit * len(PROTOCOLS))
            judged = list(
                judge(
                    backbone, tokenizer, tool, names, chosen_methods(method, tool is not None), filler,
                    sizes=Sizes(prefix, suffix), limit=limit, seed=seed, done=lambda: bar.advance(work),
                )
            )  # fmt: skip
        rows = averages(judged)
        if as_json:
            print_json({"model": model, "seed": seed, "limit": limit, "prefix": prefix, "suffix": suffix, "rows": rows})
            return
        table = Table(box=None, padding=(0, 1), header_style="bold")
        for column in ("task", "protocol", "method"):
            table.add_column(column, no_wrap=True)
        for column in ("KL", "match", "leak", "ms"):
            table.add_column(column, justify="right")
        for row in rows:
            match = "" if row["exact_match"] is None else f"{row['exact_match']:.2f}"
            cells = [f"{row['kl']:.4f}", match, f"{row['leak']:.2f}", f"{row['milliseconds']:.0f}"]
            table.add_row(row["task"], row["protocol"], row["method"], *cells)
        stdout.print(table)
