"""Tokens per second of a server that many clients use at once, against one client's.

    python benchmarks/throughput.py [--clients 16] [--tokens 48] [--repeats 3] [--output FOLDER]

Every client has a conversation of its own. One alone, all of them one after the other (`--batch 1`) and all at the same time take turns, so that
what disturbs one disturbs all; ratios are what counts. Prompts are read afresh each time and are a part of the time. Then: how many of the replies
made together, greedy, are those made one after the other. The service is called without HTTP around it.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import interleaved, report
from rich.table import Table

import kveraser as kv
from kveraser.demo.stories import pages
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.serving.service import Service, ServiceOptions
from serving import LINE, ask

ALONE, ONE_BY_ONE, TOGETHER = "one client", "one after the other", "at the same time"


def conversations(count: int) -> list[list[dict[str, str]]]:
    """One for each client; of different lengths, and about different things, so that the replies go on for a while."""
    found = list(pages())
    return [
        [{"role": "user", "content": f"{found[n % len(found)][: 150 + 40 * n]}\n{LINE.format(n=n)}Tell the story of client {n}."}]
        for n in range(count)
    ]  # fmt: skip


class Clients:
    """Clients of one service, and what was replied to them.

    Args:
        batch: of the service.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        self.service = Service(
            model, tokenizer, options=ServiceOptions(cache_budget=8 << 30, timeout=3600, batch=batch)
        )
        self.rounds = 0
        self.replies: list[list[dict[str, Any]]] = []

    def run(self, count: int, tokens: int) -> None:
        """Each of so many clients asks once."""
        self.rounds += 1

        def one(number: int) -> dict[str, Any]:
            return ask(self.service, f"{self.rounds} {number}", conversations(count)[number], "exact", tokens)

        with ThreadPoolExecutor(count) as pool:
            self.replies.append(list(pool.map(one, range(count))))


def same_start(left: str, right: str) -> float:
    """How much of a text begins another one, as a share of its characters."""
    count = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return count / max(len(left), len(right), 1)


def measure(model: Any, tokenizer: Any, clients: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Time all three; one row for each."""
    groups = {ALONE: Clients(model, tokenizer, 1), ONE_BY_ONE: Clients(model, tokenizer, 1),
              TOGETHER: Clients(model, tokenizer, clients)}  # fmt: skip
    sizes = {ALONE: 1, ONE_BY_ONE: clients, TOGETHER: clients}
    try:
        seconds = interleaved(
            model, {name: lambda g=group, n=sizes[name]: g.run(n, tokens) for name, group in groups.items()}, repeats,
            f"{clients} clients", warm_up=0,
        )  # fmt: skip
    finally:
        for group in groups.values():
            group.service.close()
    rows, alone = [], 0.0
    serial = [reply["text"] for reply in groups[ONE_BY_ONE].replies[0]]
    for name, group in groups.items():
        rates = [
            sum(reply["completion_tokens"] for reply in replies) / taken
            for replies, taken in zip(group.replies, seconds[name], strict=True)
        ]
        rate = statistics.median(rates)
        alone = alone or rate
        texts = [[reply["text"] for reply in replies] for replies in group.replies]
        pairs = [(text, serial[n]) for each in texts for n, text in enumerate(each)]
        rows.append({
            "how": name, "clients": sizes[name], "tokens_per_second": rate, "times_one_client": rate / alone,
            "first_token_seconds": statistics.median(r["seconds_to_first_token"] for e in group.replies for r in e),
            "tokens": sum(r["completion_tokens"] for r in group.replies[0]), "replies": len(pairs),
            "same_replies": sum(text == other for text, other in pairs) / len(pairs),
            "same_start": statistics.fmean(same_start(text, other) for text, other in pairs), "seconds": seconds[name],
        })  # fmt: skip
    return rows


def main(
    clients: Annotated[int, typer.Option(help="Clients at the same time.")] = 16,
    tokens: Annotated[int, typer.Option(help="Of each reply, at most.")] = 48,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 3,
    name: Annotated[str, typer.Option("--model", help="The model.")] = DEFAULT_BACKBONE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for throughput.json.")] = None,
) -> None:
    """Time it and print a table."""
    model, tokenizer = kv.load_backbone(name)
    rows = measure(model, tokenizer, clients, tokens, repeats)
    table = Table("how", title=f"{clients} clients, replies of up to {tokens} tokens, medians")
    for title in ("clients", "tokens/s in all", "times one client", "first token, s", "same replies"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["how"], str(row["clients"]), f"{row['tokens_per_second']:.1f}", f"{row['times_one_client']:.2f}",
                      f"{row['first_token_seconds']:.2f}", f"{row['same_replies']:.3f} of {row['replies']}")  # fmt: skip
    report("throughput", model, rows, table, None, output, as_json)


if __name__ == "__main__":
    typer.run(main)
