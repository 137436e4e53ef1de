"""What a server saves when a client drops a message, or changes a line: time to the first token.

    python benchmarks/serving.py [--tokens 6000] [--dropped 200] [--conversations 1] [--output FOLDER]

One conversation is cached, a message at its beginning is dropped, and the shorter conversation is asked again: by reading
it afresh, under `exact` and under `kveraser`. Then conversations whose system prompt tells the time are asked again a minute later: how much is reused,
how soon the first token comes, and whether the answers are those of `exact` (`serving_changed_line`, medians). The service is called without HTTP around it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import report, table_of
from rich.table import Table

import kveraser as kv
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.serving.completion import Prompt
from kveraser.serving.contexts.reuse import Policy
from kveraser.serving.decoding import Sampling
from kveraser.serving.service import Service, ServiceOptions

LINE = "On day {n} the stock of item {n} was counted twice, and the count was entered into the list. "


def conversation(service: Service, owner: str, dropped: int, tokens: int) -> list[dict[str, str]]:
    """A conversation of about so many tokens; message 2 has about `dropped` tokens."""

    def fill(count: int) -> str:
        text, number = "", 0
        while len(service.tokenizer.encode(text)) < count:
            text, number = text + LINE.format(n=number), number + 1
        return text

    each = 400
    talk = [{"role": "system", "content": f"You help {owner}."}, {"role": "user", "content": "Look it up."}]
    talk.append({"role": "tool", "content": fill(dropped)})
    for number in range((tokens - dropped) // each):
        talk.append({"role": ("user", "assistant")[number % 2], "content": f"Part {number}. {fill(each - 10)}"})
    return [*talk, {"role": "user", "content": "Which item was counted on day 3?"}]


def ask(service: Service, owner: str, talk: list[dict[str, str]], policy: Policy, tokens: int = 1) -> dict[str, Any]:
    """Ask; what was reused, and seconds to the first token and in all (waiting included)."""
    text = service.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tuple(service.tokenizer.encode(str(text), add_special_tokens=False))
    prompt = Prompt(owner, ids, policy, Sampling(max_tokens=tokens))
    started, first = time.perf_counter(), []
    job = service.submit(lambda job: service.complete(prompt, job, lambda *_: first.append(time.perf_counter())))
    reply = job.future.result()
    return {**asdict(reply.reuse), "prompt_tokens": len(ids), "seconds_to_first_token": first[0] - started,
            "seconds_in_all": time.perf_counter() - started, "completion_tokens": reply.completion_tokens,
            "text": reply.text}  # fmt: skip


def a_message_dropped(service: Service, tokens: int, dropped: int) -> dict[str, dict[str, Any]]:
    """A conversation without a message of its beginning: read afresh, and where it is cached with that message."""
    found = {}
    for how, policy in (("read afresh", "exact"), ("exact", "exact"), ("kveraser", "kveraser")):
        talk = conversation(service, how, dropped, tokens)
        if how != "read afresh":
            ask(service, how, talk, "exact")
        del talk[2]
        found[how] = ask(service, how, talk, policy)  # type: ignore[arg-type]
    return found


def dropped_rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way."""
    slowest = found["read afresh"]["seconds_to_first_token"]
    return [
        {"how": how, "conversations": 1, "share_reused": row["tokens_reused"] / row["prompt_tokens"],
         "times_sooner": slowest / row["seconds_to_first_token"], **row}
        for how, row in found.items()
    ]  # fmt: skip


def dropped_table(rows: list[dict[str, Any]]) -> Table:
    """What a dropped message costs."""
    table = table_of(
        ["a message dropped"],
        ("conversations", "prompt tokens", "reused", "run", "exact", "first token, s", "times sooner"),
    )
    for row in rows:
        table.add_row(row["how"], str(row["conversations"]), str(row["prompt_tokens"]), f"{row['share_reused']:.1%}", str(row["tokens_recomputed"]),
                      "yes" if row["exact"] else "no", f"{row['seconds_to_first_token']:.2f}", f"{row['times_sooner']:.1f}")  # fmt: skip
    return table


def a_minute_later(service: Service, tokens: int, conversations: int, answer: int) -> list[dict[str, Any]]:
    """Conversations whose system prompt tells the time, asked again with another time under `kveraser`, and read afresh."""
    found: list[dict[str, Any]] = []
    for number in range(conversations):
        owner = f"caller {number}"
        talk = conversation(service, owner, 200, tokens)
        talk[-1] = {"role": "user", "content": f"Which item was counted on day {3 + number}?"}
        told = talk[0]["content"]

        def at(minute: int, talk: list[dict[str, str]] = talk, told: str = told) -> list[dict[str, str]]:
            return [{"role": "system", "content": f"{told} It is 2026-11-26 14:{minute:02}:07."}, *talk[1:]]

        ask(service, owner, at(31), "exact")
        changed = ask(service, owner, at(32), "kveraser", answer)
        fresh = ask(service, f"{owner}, afresh", at(32), "exact", answer)
        found.append({
            "reused": changed["tokens_reused"] / changed["prompt_tokens"], "method": changed["method"],
            "prompt_tokens": changed["prompt_tokens"], "tokens_recomputed": changed["tokens_recomputed"],
            "first_token": changed["seconds_to_first_token"], "first_token_afresh": fresh["seconds_to_first_token"],
            "times_sooner": fresh["seconds_to_first_token"] / changed["seconds_to_first_token"],
            "same": changed["text"] == fresh["text"], "texts": [changed["text"], fresh["text"]],
        })  # fmt: skip
    return found


def changed_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way, medians over the conversations."""

    def typical(name: str) -> float:
        return statistics.median(row[name] for row in found)

    same = {"conversations": len(found), "prompt_tokens": typical("prompt_tokens")}
    return [
        {"how": "read afresh", **same, "share_reused": 0.0, "tokens_recomputed": typical("prompt_tokens"),
         "first_token_seconds": typical("first_token_afresh"), "times_sooner": 1.0, "same_answers": len(found)},
        {"how": "kveraser", **same, "share_reused": typical("reused"), "tokens_recomputed": typical("tokens_recomputed"),
         "first_token_seconds": typical("first_token"), "times_sooner": typical("times_sooner"),
         "same_answers": sum(row["same"] for row in found)},
    ]  # fmt: skip


def changed_table(rows: list[dict[str, Any]]) -> Table:
    """What a line that changes costs."""
    table = table_of(
        ["a line changed"],
        (
            "conversations",
            "prompt tokens",
            "reused",
            "run",
            "first token, s",
            "times sooner",
            "answers the same",
        ),
    )
    for row in rows:
        table.add_row(row["how"], str(row["conversations"]), f"{row['prompt_tokens']:.0f}", f"{row['share_reused']:.1%}", f"{row['tokens_recomputed']:.0f}",
                      f"{row['first_token_seconds']:.2f}", f"{row['times_sooner']:.1f}", f"{row['same_answers']} of {row['conversations']}")  # fmt: skip
    return table


def main(
    tokens: Annotated[int, typer.Option(help="Length of the conversation.")] = 6000,
    dropped: Annotated[int, typer.Option(help="Length of the message that is dropped.")] = 200,
    conversations: Annotated[int, typer.Option(help="Conversations that tell the time; 0 leaves this out.")] = 1,
    answer: Annotated[int, typer.Option(help="Tokens of their answers.")] = 16,
    name: Annotated[str, typer.Option("--model", help="The model.")] = DEFAULT_BACKBONE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for serving.json and serving_changed_line.json.")] = None,
) -> None:
    """Time it and print what was found."""
    model, tokenizer = kv.load_backbone(name)
    service = Service(model, tokenizer, options=ServiceOptions(cache_budget=8 << 30, timeout=3600))
    later: list[dict[str, Any]] = []
    try:
        dropped_now = a_message_dropped(service, tokens, dropped)
        if conversations:
            later = a_minute_later(service, tokens, conversations, answer)
    finally:
        service.close()
    rows = dropped_rows(dropped_now)
    report("serving", model, rows, dropped_table(rows), None, output, as_json, {"model": name})
    if later:
        rows = changed_rows(later)
        facts = {"model": name, "conversations": later}
        report("serving_changed_line", model, rows, changed_table(rows), None, output, as_json, facts)


if __name__ == "__main__":
    typer.run(main)
