"""What the edit-aware proxy saves before two vLLM servers when a client drops a message, against vLLM's own prefix cache.

    python benchmarks/engine_vllm_proxy.py [--tokens 1500] [--output FOLDER]     (in the environment of `make test-vllm`)

One run: the `openai` client has a conversation answered, drops a message near its beginning, and asks again and once more; straight from
one server, and through the proxy. Then the server that has the conversation is stopped, and it goes on. Tokens processed are what the
engines say they ran (`vllm:iteration_tokens`), the erase's own passes included; for the erase and the reply, without the refresh of `auto`.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
import uvicorn
from engine_vllm import facts
from measuring import report_table, table_of
from rich.table import Table

from kveraser.demo.stories import pages
from kveraser.engines.vllm.proxy.app import ProxyAppOptions, create_proxy
from kveraser.engines.vllm.proxy.front import Front, ProxyOptions
from kveraser.engines.vllm.server.launch import running_server, server_arguments, shipped_folder
from kveraser.model.backbone import DEFAULT_BACKBONE

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
STALE = "Note: the meeting with Maria was moved to Friday at nine, in the green room on the second floor."
FACT = "Note: the meeting with Maria is on Monday at four, in the blue room on the first floor."
Talk = list[dict[str, str]]


def conversation(tag: str, tokens: int) -> Talk:
    """About so many tokens; message 2 says what message 1 says otherwise."""
    talk = [{"role": "system", "content": f"You help with the notes of {tag}. Answer in one short sentence."}]
    talk += [{"role": "user", "content": FACT}, {"role": "user", "content": STALE}]
    text = [page for page in pages() if len(page) > 200]
    for number, page in enumerate(text * (1 + tokens // 100)):
        if sum(len(entry["content"]) for entry in talk) > 4.4 * tokens:
            break
        talk.append({"role": ("assistant", "user")[number % 2], "content": page})
    return [*talk, {"role": "user", "content": "On which day is the meeting with Maria?"}]


def processed(addresses: list[str]) -> float:
    """Tokens that the engines have run so far."""
    found = 0.0
    for address in addresses:
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        found += sum(map(float, re.findall(r"^vllm:iteration_tokens_total_sum\{[^}]*\} (\S+)$", text, re.M)))
    return found


def ask(address: str, talk: Talk, servers: list[str]) -> dict[str, Any]:
    """Ask; tokens processed, seconds to the first token and in all, the answer, and what the proxy says of it."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    before, started, first, text, told = processed(servers), time.perf_counter(), 0.0, "", None
    with client.chat.completions.with_raw_response.create(
        model=DEFAULT_BACKBONE,
        messages=talk,
        max_tokens=16,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    ).parse() as stream:
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            first = first or (time.perf_counter() - started if piece else 0.0)
            text += piece or ""
            told = (chunk.model_extra or {}).get("kveraser") or told
    seconds = time.perf_counter() - started
    time.sleep(0.2)  # the engines publish what they ran a little later
    return {"processed": round(processed(servers) - before), "seconds_to_first_token": round(first, 3),
            "seconds_in_all": round(seconds, 3), "answer": " ".join(text.split()), "kveraser": told}  # fmt: skip


def turns(
    address: str, tag: str, tokens: int, servers: list[str], pause: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, Any]]:
    """The turns of one conversation."""
    talk = conversation(tag, tokens)
    yield "the whole conversation", ask(address, talk, servers)
    del talk[2]
    yield "a message dropped", (dropped := ask(address, talk, servers))
    pause()
    talk += [
        {"role": "assistant", "content": dropped["answer"]},
        {"role": "user", "content": "And in which room is it?"},
    ]
    yield "the next turn", ask(address, talk, servers)
    yield "talk", talk


@contextmanager
def proxy_before(servers: list[str], policy: str) -> Iterator[tuple[str, Front]]:
    """A proxy in a thread of this process."""
    front = Front(servers, ProxyOptions(policy=policy))  # type: ignore[arg-type]
    config = uvicorn.Config(create_proxy(front, ProxyAppOptions()), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not (server.started and all(replica.max_tokens for replica in front.replicas.all)):
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", front
    finally:
        server.should_exit = True
        thread.join()


def measure(servers: list[str], stops: list[Callable[[], None]], tokens: int, repeat: int) -> dict[str, Any]:
    """All rows.

    Args:
        stops: what stops each server; none leaves out what comes after.
    """
    found: dict[str, Any] = {}
    run = int(time.time()) % 100_000  # servers that run already may have read the conversations of another run
    ask(servers[0], conversation("warm-up", 64), servers)
    for number in range(repeat):
        note(found, "vLLM's prefix cache", turns(servers[0], f"Ada {run}-{number}", tokens, servers))
    with proxy_before(servers, "kveraser") as (address, _):
        for number in range(repeat):
            note(found, "proxy, kveraser", turns(address, f"Bob {run}-{number}", tokens, servers))
    with proxy_before(servers, "auto") as (address, front):
        for number in range(repeat):
            talk = note(found, "proxy, auto", turns(address, f"Cleo {run}-{number}", tokens, servers, refreshed(front)))
        if stops:
            holder = max(front.conversations, key=lambda each: len(each.view)).replica
            stops[holder]()
            rest = [servers[1 - holder]]
            last = found["proxy, auto"][-1]["the next turn"]["answer"]
            talk += [{"role": "assistant", "content": last}, {"role": "user", "content": "Who is it with?"}]
            note(found, "proxy, its server stopped", iter([("the turn after it", ask(address, talk, rest))]))
            talk[0] = conversation("nobody", 0)[0]  # so that nothing of it is cached
            note(found, "a server that has read nothing", iter([("the turn after it", ask(rest[0], talk, rest))]))
    return found


def note(found: dict[str, Any], name: str, rows: Iterator[tuple[str, Any]]) -> Talk:
    """Enter the turns of a conversation as they come; the conversation in the end."""
    run: dict[str, Any] = {}
    found.setdefault(name, []).append(run)
    for turn, row in rows:
        if turn == "talk":
            return row  # type: ignore[no-any-return]
        run[turn] = row
        print(f"{name}, {turn}: {row}", flush=True)
    return []


def refreshed(front: Front) -> Callable[[], None]:
    """Waits until nothing is edited any more."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while any(entry.session for entry in front.conversations) and time.monotonic() < deadline:
            time.sleep(0.2)

    return wait


def main(
    tokens: Annotated[int, typer.Option(help="Length of the conversation, about.")] = 1500,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeat: Annotated[int, typer.Option(min=1, help="Conversations for each row.")] = 1,
    upstream: Annotated[
        list[str] | None, typer.Option(help="Two servers that run already, in place of new ones; none is stopped then.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for vllm_proxy.json.")] = None,
) -> None:
    """Run it and print the tables."""
    extra = ["--dtype", dtype, "--max-model-len", str(2 * tokens + 512), "--max-num-seqs", "4", "--block-size", "32",
             "--enforce-eager"]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as first,
        ExitStack() as second,
        ThreadPoolExecutor(2) as pool,
    ):

        def start(number: int, stack: ExitStack) -> str:
            arguments = server_arguments(
                DEFAULT_BACKBONE, shipped_folder(DEFAULT_BACKBONE), Path(folder) / f"store{number}", extra=extra
            )
            log = Path(tempfile.gettempdir()) / f"kveraser-bench-vllm-{number}.log"
            return stack.enter_context(running_server(arguments, log=log, **ENVIRONMENT))

        if upstream:
            found = measure(upstream, [], tokens, repeat)
        else:
            print("starting two vLLM servers ...", flush=True)
            servers = list(pool.map(start, range(2), (first, second)))
            found = measure(servers, [first.close, second.close], tokens, repeat)
    rows = summary(found)
    environment = {
        **facts(dtype),
        "threads": os.environ.get("OMP_NUM_THREADS") if upstream else ENVIRONMENT["OMP_NUM_THREADS"],
    }
    report_table(
        "vllm_proxy", {"benchmark": "vllm_proxy", "environment": environment, "rows": rows}, show(rows), output
    )


TURNS = ("the whole conversation", "a message dropped", "the next turn", "the turn after it")


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each turn and way, medians over the conversations."""
    rows = []
    for turn in TURNS:
        for way, runs in found.items():
            some = [run[turn] for run in runs if turn in run]
            if some:
                said = [run["kveraser"] or {} for run in some]
                numbers = {
                    name: statistics.median(run[name] for run in some)
                    for name in ("processed", "seconds_to_first_token", "seconds_in_all")
                }
                rows.append({
                    "turn": turn, "way": way, "conversations": len(some), **numbers,
                    "method": said[0].get("method", "passed on"), "exact": all(each.get("exact", True) for each in said),
                    "erase_seconds": statistics.median(each.get("erase_seconds") or 0 for each in said),
                    "answers": [run["answer"] for run in some],
                })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> Table:
    """Tokens and seconds of each turn."""
    table = table_of(
        ["turn", "way"],
        (
            "conversations",
            "tokens processed",
            "first token, s",
            "of it the erase, s",
            "in all, s",
            "method",
            "exact",
        ),
    )
    for row in rows:
        table.add_row(row["turn"], row["way"], str(row["conversations"]), f"{row['processed']:g}", f"{row['seconds_to_first_token']:.1f}",
                      f"{row['erase_seconds']:.1f}", f"{row['seconds_in_all']:.1f}", row["method"], "yes" if row["exact"] else "no")  # fmt: skip
    return table


if __name__ == "__main__":
    typer.run(main)
