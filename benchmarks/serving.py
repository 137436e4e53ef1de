"""What a server saves when a client drops a message: time to the first token, and latencies of many clients.

    python benchmarks/serving.py [--tokens 6000] [--dropped 200] [--clients 16] [--output FOLDER]

One conversation is cached, a message at its beginning is dropped, and the shorter conversation is asked again: by reading
it afresh, under `exact` and under `kveraser`. Then clients take turns. The service is called without HTTP around it.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kveraser as kv
from kveraser.evaluation.provenance import environment
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
    prompt = Prompt(owner, ids, policy, Sampling(tokens))
    started, first = time.perf_counter(), []
    job = service.submit(lambda job: service.complete(prompt, job, lambda *_: first.append(time.perf_counter())))
    reply = job.future.result()
    return {**asdict(reply.reuse), "prompt_tokens": len(ids), "seconds_to_first_token": first[0] - started,
            "seconds_in_all": time.perf_counter() - started, "text": reply.text}  # fmt: skip


def main(
    tokens: Annotated[int, typer.Option(help="Length of the conversation.")] = 6000,
    dropped: Annotated[int, typer.Option(help="Length of the message that is dropped.")] = 200,
    clients: Annotated[int, typer.Option(help="Clients that take turns; 0 leaves this out.")] = 16,
    turns: Annotated[int, typer.Option(help="Turns of each client.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for serving.json.")] = None,
) -> None:
    """Time it and print two tables."""
    model, tokenizer = kv.load_backbone()
    service = Service(model, tokenizer, options=ServiceOptions(cache_budget=8 << 30, timeout=3600))
    found: dict[str, Any] = {"drop": {}, "clients": {}}
    try:
        for name, policy in (("read afresh", "exact"), ("exact", "exact"), ("kveraser", "kveraser")):
            talk = conversation(service, name, dropped, tokens)
            if name != "read afresh":
                ask(service, name, talk, "exact")
            del talk[2]
            found["drop"][name] = ask(service, name, talk, policy)

        def client(number: int) -> list[float]:
            talk, seconds = [{"role": "user", "content": f"I am number {number}. Count to five."}], []
            for _ in range(turns):
                reply = ask(service, "shared", talk, "exact", 8)
                seconds.append(reply["seconds_in_all"])
                talk += [{"role": "assistant", "content": reply["text"]}, {"role": "user", "content": "Go on."}]
            return seconds

        if clients:
            with ThreadPoolExecutor(clients) as pool:
                seconds = sorted(second for each in pool.map(client, range(clients)) for second in each)
            cuts = statistics.quantiles(seconds, n=20)
            found["clients"] = {"clients": clients, "turns": turns, "p50": cuts[9], "p95": cuts[18]}
    finally:
        service.close()
    table = Table("how", "prompt tokens", "reused", "run", "exact", "first token, s", "times faster", box=None)
    slowest = found["drop"]["read afresh"]["seconds_to_first_token"]
    for name, row in found["drop"].items():
        first = row["seconds_to_first_token"]
        table.add_row(name, str(row["prompt_tokens"]), str(row["tokens_reused"]), str(row["tokens_recomputed"]),
                      "yes" if row["exact"] else "no", f"{first:.2f}", f"{slowest / first:.1f}")  # fmt: skip
    Console(width=110).print(table)
    if clients:
        print(f"{clients} clients, {turns} turns of 8 tokens each: p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "serving.json").write_text(json.dumps({**found, **environment(model)}, indent=1))


if __name__ == "__main__":
    typer.run(main)
