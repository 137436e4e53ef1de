"""Tokens per second of a server that many clients use at once, against one client's.

    python benchmarks/throughput.py [--clients 16] [--tokens 32] [--repeats 3] [--output FOLDER]

Every client has a conversation of its own that goes on turn by turn; the first turn, in which it is read, is not timed. One client alone, all of
them one after the other (`--batch 1`) and all at the same time take turns, so that what disturbs one disturbs all; ratios are what counts. Then: how many of the
replies made together, greedy, are those made one after the other to the same conversation. The service is called without HTTP around it.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import interleaved, report, table_of

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

    def __init__(self, model: Any, tokenizer: Any, batch: int, count: int, tokens: int) -> None:
        self.service = Service(
            model, tokenizer, options=ServiceOptions(cache_budget=8 << 30, timeout=3600, batch=batch)
        )
        self.talks, self.tokens = conversations(count), tokens
        self.turns: list[list[tuple[str, dict[str, Any]]]] = []
        """For each turn, what each client had sent, and the reply."""

    def turn(self) -> None:
        """Each client asks once, and will have its conversation go on."""

        def one(number: int) -> tuple[str, dict[str, Any]]:
            talk = self.talks[number]
            sent, reply = str(talk), ask(self.service, str(number), talk, "exact", self.tokens)
            talk += [{"role": "assistant", "content": reply["text"]}, {"role": "user", "content": "Go on."}]
            return sent, reply

        with ThreadPoolExecutor(len(self.talks)) as pool:
            self.turns.append(list(pool.map(one, range(len(self.talks)))))


def same_start(left: str, right: str) -> float:
    """How much of a text begins another one, as a share of its characters."""
    count = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return count / max(len(left), len(right), 1)


def measure(model: Any, tokenizer: Any, clients: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Time all three; one row for each."""
    sizes = {ALONE: (1, 1), ONE_BY_ONE: (1, clients), TOGETHER: (clients, clients)}
    groups = {name: Clients(model, tokenizer, *size, tokens) for name, size in sizes.items()}
    try:
        seconds = interleaved(
            model, {name: group.turn for name, group in groups.items()}, repeats, f"{clients} clients"
        )
    finally:
        for group in groups.values():
            group.service.close()
    rows, alone = [], 0.0
    for name, group in groups.items():
        timed = [[reply for _, reply in turn] for turn in group.turns[1:]]
        rates = [sum(r["completion_tokens"] for r in turn) / s for turn, s in zip(timed, seconds[name], strict=True)]
        rate = statistics.median(rates)
        alone = alone or rate
        pairs = [
            (reply["text"], other["text"])
            for turn, others in zip(group.turns, groups[ONE_BY_ONE].turns, strict=True)
            for (sent, reply), (known, other) in zip(turn, others, strict=False)
            if sent == known
        ]
        rows.append({
            "how": name, "clients": sizes[name][1], "tokens_per_second": rate, "times_one_client": rate / alone,
            "first_token_seconds": statistics.median(r["seconds_to_first_token"] for turn in timed for r in turn),
            "tokens": sum(r["completion_tokens"] for r in timed[0]), "replies": len(pairs),
            "same_replies": sum(text == other for text, other in pairs) / len(pairs),
            "same_start": statistics.fmean(same_start(text, other) for text, other in pairs), "seconds": seconds[name],
        })  # fmt: skip
    return rows


def main(
    clients: Annotated[int, typer.Option(help="Clients at the same time.")] = 16,
    tokens: Annotated[int, typer.Option(help="Of each reply, at most.")] = 32,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 3,
    name: Annotated[str, typer.Option("--model", help="The model.")] = DEFAULT_BACKBONE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for throughput.json.")] = None,
) -> None:
    """Time it and print a table."""
    model, tokenizer = kv.load_backbone(name)
    rows = measure(model, tokenizer, clients, tokens, repeats)
    table = table_of(
        ["how"],
        ("clients", "tokens/s in all", "times one client", "first token, s", "same replies"),
        title=f"{clients} clients, replies of up to {tokens} tokens, medians",
    )
    for row in rows:
        table.add_row(row["how"], str(row["clients"]), f"{row['tokens_per_second']:.1f}", f"{row['times_one_client']:.2f}",
                      f"{row['first_token_seconds']:.2f}", f"{row['same_replies']:.3f} of {row['replies']}")  # fmt: skip
    report("throughput", model, rows, table, None, output, as_json, {"model": name})


if __name__ == "__main__":
    typer.run(main)
