"""What an agent pays that clears its old tool results, by policy: tokens processed, seconds, and whether it still makes the same calls.

    python benchmarks/agent_loop.py [--model qwen2.5-coder-0.5b-instruct] [--calls 20] [--keep 3] [--api openai] [--output FOLDER]

A transcript of tool calls is replayed call by call against a server on loopback, as the clients of both APIs send it: OpenAI's with the
results before the last few replaced by the placeholder, as agent frameworks do it, and Anthropic's whole, with a `context_management` edit
that has the server clear them. The model makes each call itself, and that is what is compared; the transcript then goes on with its
own call, so that all policies are asked the same. `exact` is prefix caching alone. What a policy processed anew is split: what no cache could have (`new`: behind all that was sent before), and what had been read before and was
read again. What `auto` makes exact while there is nothing to do is not counted; in the `seconds` of its replies it may show.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import uvicorn
from measuring import report, table_of
from rich.table import Table

import kveraser as kv
from kveraser.serving.app import AppOptions, create_app
from kveraser.serving.service import Service, ServiceOptions

POLICIES = ("exact", "kveraser", "auto")
APIS = ("openai", "anthropic")
PLACEHOLDER = "[cleared]"
SYSTEM = "You look up the stock of items, one call of a tool at a time. Look up item after item, in order, beginning with item 1."
ASK = "Look up items 1 to {calls}, one after the other."
SCHEMA = {"type": "object", "properties": {"item": {"type": "integer"}}, "required": ["item"]}
TOOLS = {"stock_of": "Tells the stock of an item.", "price_of": "Tells the price of an item."}


class Transcript:
    """Calls and their results.

    Args:
        calls: how many.
        words: about so many of each result.
    """

    def __init__(self, calls: int, words: int) -> None:
        self.calls, self.words = calls, words

    def result(self, number: int) -> str:
        """What the tool says."""
        text = f"Item {number}: the stock is {number * 37 % 101}. "
        line = f"Shelf {{n}} holds {number * 7 % 23} boxes of item {number}, counted on day {{n}}. "
        while len(text.split()) < self.words:
            text += line.format(n=len(text.split()))
        return text.strip()

    def openai(self, made: int, keep: int) -> dict[str, Any]:
        """The body after so many calls, the results before the last `keep` cleared by the client."""
        talk: list[dict[str, Any]] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": ASK.format(calls=self.calls)},
        ]
        for number in range(1, made + 1):
            call = {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": "stock_of", "arguments": f'{{"item": {number}}}'},
            }
            talk.append({"role": "assistant", "content": None, "tool_calls": [call]})
            shown = self.result(number) if number > made - keep else PLACEHOLDER
            talk.append({"role": "tool", "tool_call_id": f"call_{number}", "content": shown})
        tools = [
            {"type": "function", "function": {"name": name, "description": said, "parameters": SCHEMA}}
            for name, said in TOOLS.items()
        ]
        return {"messages": talk, "tools": tools, "tool_choice": "required"}

    def anthropic(self, made: int, keep: int) -> dict[str, Any]:
        """The body after so many calls, with the edit that has the server clear the results before the last `keep`."""
        talk: list[dict[str, Any]] = [{"role": "user", "content": ASK.format(calls=self.calls)}]
        for number in range(1, made + 1):
            name = f"toolu_{number}"
            talk.append(
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": name, "name": "stock_of", "input": {"item": number}}],
                }
            )
            talk.append(
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": name, "content": self.result(number)}],
                }
            )
        tools = [{"name": name, "description": said, "input_schema": SCHEMA} for name, said in TOOLS.items()]
        edit = {
            "type": "clear_tool_uses_20250919",
            "trigger": {"type": "tool_uses", "value": keep},
            "keep": {"type": "tool_uses", "value": keep},
        }
        return {"system": SYSTEM, "messages": talk, "tools": tools, "tool_choice": {"type": "any"},
                "context_management": {"edits": [edit]}}  # fmt: skip


def step(client: httpx.Client, api: str, policy: str, body: dict[str, Any], name: str, tokens: int) -> dict[str, Any]:
    """Have the model make a call: the call, tokens of the prompt, and the reply's object `kveraser`."""
    body = {**body, "model": name, "max_tokens": tokens, "temperature": 0, "kveraser": {"policy": policy}}
    headers = {"Authorization": f"Bearer {api}-{policy}", "anthropic-version": "2023-06-01"}
    started = time.perf_counter()
    path = "/v1/chat/completions" if api == "openai" else "/v1/messages"
    answer = client.post(path, json=body, headers=headers)
    seconds = time.perf_counter() - started
    if answer.status_code != 200:
        raise SystemExit(f"{path} answered {answer.status_code}: {answer.text}")
    reply = answer.json()
    usage = reply["usage"]
    if api == "openai":
        message, prompt = reply["choices"][0]["message"], usage["prompt_tokens"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        said = str(calls or message["content"])
    else:
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        said = str([(block.get("name"), block.get("input"), block.get("text")) for block in reply["content"]])
    return {"said": said, "prompt": prompt, "wall": seconds, **reply["kveraser"]}


def replay(
    client: httpx.Client, api: str, policy: str, transcript: Transcript, name: str, keep: int, tokens: int
) -> list[dict[str, Any]]:
    """One policy's way through a transcript."""
    body = transcript.openai if api == "openai" else transcript.anthropic
    return [step(client, api, policy, body(made, keep), name, tokens) for made in range(transcript.calls)]


@contextmanager
def served(service: Service, name: str) -> Iterator[httpx.Client]:
    """A client of the service, over HTTP on loopback; each policy has a key of its own."""
    keys = [f"{api}-{policy}" for api in APIS for policy in POLICIES]
    server = uvicorn.Server(uvicorn.Config(create_app(service, AppOptions(name, keys)), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=3600) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def measure(
    service: Service, name: str, transcript: Transcript, apis: list[str], keep: int, tokens: int
) -> list[dict[str, Any]]:
    """One row for each API and policy."""
    rows = []
    with served(service, name) as client:
        for api in apis:
            exact: list[dict[str, Any]] = []
            for policy in POLICIES:
                found = replay(client, api, policy, transcript, name, keep, tokens)
                exact = exact or found
                new = found[0]["prompt"] + sum(
                    _new(api, transcript, made, keep, found) for made in range(1, transcript.calls)
                )
                run = sum(step["tokens_recomputed"] for step in found)
                rows.append({
                    "api": api, "policy": policy, "calls": len(found), "prompt_tokens": sum(step["prompt"] for step in found),
                    "tokens_processed": run, "times_fewer": sum(step["tokens_recomputed"] for step in exact) / run,
                    "read_again": run - new, "first_token_seconds": sum(step["seconds"] for step in found),
                    "seconds": sum(step["wall"] for step in found), "exact_replies": sum(step["exact"] for step in found),
                    "same_calls": sum(a["said"] == b["said"] for a, b in zip(found, exact, strict=True)) / len(found),
                    "steps": found,
                })  # fmt: skip
    return rows


def _new(api: str, transcript: Transcript, made: int, keep: int, found: list[dict[str, Any]]) -> int:
    """Tokens that a prompt has behind all that was sent before: without what was cleared meanwhile, by how much longer it is."""
    if made <= keep:
        return int(found[made]["prompt"] - found[made - 1]["prompt"])
    return _new(api, transcript, keep, keep, found)  # every call and result is about as long as every other


def main(
    name: Annotated[
        str, typer.Option("--model", help="Its chat template needs tools.")
    ] = "qwen2.5-coder-0.5b-instruct",
    calls: Annotated[int, typer.Option(help="Calls of tools.")] = 20,
    keep: Annotated[int, typer.Option(help="Results that are not cleared.")] = 3,
    words: Annotated[int, typer.Option(help="Words of each result, about.")] = 80,
    tokens: Annotated[int, typer.Option(help="Of a reply, at most.")] = 24,
    api: Annotated[list[str] | None, typer.Option(help="openai or anthropic; default: both.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for agent_loop.json.")] = None,
) -> None:
    """Replay it and print a table."""
    model, tokenizer = kv.load_backbone(name)
    service = Service(model, tokenizer, options=ServiceOptions(cache_budget=8 << 30, timeout=3600))
    try:
        rows = measure(service, name, Transcript(calls, words), api or list(APIS), keep, tokens)
    finally:
        service.close()
    facts = {"model": name, "calls": calls, "keep": keep, "words": words}
    report("agent_loop", model, rows, shown(rows), None, output, as_json, facts)


def shown(rows: list[dict[str, Any]]) -> Table:
    """What each API and policy cost."""
    table = table_of(
        ["API", "policy"],
        (
            "calls",
            "prompt tokens",
            "processed",
            "times fewer",
            "of them read again",
            "first tokens, s",
            "in all, s",
            "same calls",
        ),
    )
    for row in rows:
        table.add_row(row["api"], row["policy"], str(row["calls"]), str(row["prompt_tokens"]), str(row["tokens_processed"]),
                      f"{row['times_fewer']:.2f}", str(row["read_again"]), f"{row['first_token_seconds']:.1f}", f"{row['seconds']:.1f}",
                      f"{row['same_calls']:.2f}")  # fmt: skip
    return table


if __name__ == "__main__":
    typer.run(main)
