"""Erasing inside vLLM: distance to its own full recomputation, and the cost of erases of several sessions at once.

    python benchmarks/engine_vllm.py quality [-t needle] [--limit 1] [--lengths 500] [--dtype bfloat16] [--model FOLDER --eraser FOLDER] [--url URL] [--output FOLDER]
    python benchmarks/engine_vllm.py sessions [--count 1 --count 4] [--tokens 300] [--repeats 3] [--url URL] [--output FOLDER]

Run it where vLLM is installed; without `--url` it starts a server with the embedded model. `quality`: held-out examples of the tasks,
question asked after the erase / already cached; KL(full recomputation || method) in nats per token of full recomputation's answer, from
each side's most likely tokens, the others taken together (so a little too small); what each context gave is kept as it comes, and summed up as in
`distances.py`. `sessions`: milliseconds of an erase by number of
sessions that erase at the same time, against the same erases one by one.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from distances import earlier, of_context, record, summarise
from measuring import engine_environment, report_table, table_of, write_json

import kveraser as kv
from kveraser.engines.vllm.client import VLLMSession, erase_together
from kveraser.engines.vllm.client.erasing import Erasing
from kveraser.engines.vllm.protocol import Demand, Piece, Save
from kveraser.engines.vllm.server.launch import running_server, server_arguments, shipped_folder
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.evaluation.runner import EvalOptions, draw
from kveraser.methods import as_method
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.spans import Span
from kveraser.tasks import Filler
from kveraser.tasks.sources import read_passages

app = typer.Typer(help=__doc__, no_args_is_help=True)
Way = dict[str, Any] | int | None
"""A session's options; or what is behind the span is moved up, and so many of the next tokens computed again; or nothing is done."""
WAYS: dict[str, Way] = {
    "no-erase": None,
    "delete-and-shift": 0,
    "delete-and-shift, next 64": 64,
    "trained eraser, next 32": {"eraser": "eraser", "choose": "next"},
    "hidden": {"repair": 0, "close_gaps": False},
    "hidden, gap closed": {"repair": 0, "close_gaps": True},
    "hidden, 64 readers": {"close_gaps": False, "repair": 64},
    "hidden, 64 readers, gap closed": {"close_gaps": True, "repair": 64},
}
MOST_LIKELY = 500
Url = Annotated[str | None, typer.Option(help="A server that runs already; default: start one.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the JSON file.")]


@contextmanager
def server(
    url: str | None, dtype: str, sequences: int = 8, model: str = DEFAULT_BACKBONE, eraser: Path | None = None
) -> Iterator[str]:
    """A server's address."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", str(sequences), "--block-size", "32",
                 "--enforce-eager", "--max-logprobs", str(MOST_LIKELY)]  # fmt: skip
        said = server_arguments(model, eraser or shipped_folder(model), Path(folder) / "store", extra=extra)
        log = Path(tempfile.gettempdir()) / "kveraser-bench-vllm.log"
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with running_server(said, log=log, **settings) as address:
            yield address


def facts(dtype: str, model: str = DEFAULT_BACKBONE) -> dict[str, Any]:
    """What a benchmark was made with."""
    return engine_environment(
        model=Path(model).name,
        vllm=_vllm(),
        dtype=dtype,
        cores=os.cpu_count(),
        threads=os.environ.get("OMP_NUM_THREADS"),
    )


def _vllm() -> str:
    """The version that is installed, under whichever of its names."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "not installed here"


Ask = Callable[[Sequence[int]], dict[int, float]]
"""From ids behind the context to the log-probabilities of the most likely next ones."""


def asking(session: VLLMSession, ids: Sequence[int], demand: Demand | None, salt: str | None) -> Ask:
    """How a context is asked."""

    def ask(more: Sequence[int]) -> dict[int, float]:
        body = {"model": session.model, "prompt": [*ids, *more], "max_tokens": 1, "temperature": 0.0,
                "logprobs": MOST_LIKELY, "return_tokens_as_token_ids": True}  # fmt: skip
        body |= {"kv_transfer_params": demand.params(), "cache_salt": salt} if demand else {}
        said = session._client.call("/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(name.removeprefix("token_id:")): value for name, value in said.items()}

    return ask


def of_session(session: VLLMSession) -> Ask:
    """A session's context."""
    edit = session._state.edit
    demand = Demand(edit=edit.id) if edit else None
    return asking(session, session._state.ids, demand, edit.salt if edit else None)


def shifted(session: VLLMSession, span: Span, repair: int) -> Ask:
    """The context without a span, what is behind it moved up; so many of the next tokens are computed again, behind what stays."""
    work, ids = Erasing(session._served(), session._state), list(session._state.ids)
    moved = min(span.end + repair, len(ids) - 1)
    saves = (Save(0, span.start), Save(moved, len(ids)))
    first, last = work._send(session.model, ids, Demand(save=saves))
    left = [*ids[: span.start], *ids[span.end :]]
    pieces = [Piece(first, 0, len(saves[0]))]
    if moved > span.end:
        behind = moved - len(span)
        anew = work._send(session.model, left[:behind], Demand(save=(Save(span.start, behind),)))[0]
        pieces.append(Piece(anew, 0, behind - span.start))
    pieces.append(Piece(last, 0, len(saves[1]), -len(span)))
    edit = work._complete(session.model, left, Demand(compose=tuple(pieces)), None)["edit"]
    work.forget()
    return asking(session, left, Demand(edit=edit["id"]), edit["salt"])


def divergence(wanted: dict[int, float], found: dict[int, float]) -> float:
    """KL over the tokens that both name, and all others together."""
    both = wanted.keys() & found.keys()
    total = sum(math.exp(wanted[token]) * (wanted[token] - found[token]) for token in both)
    rest = [max(1 - sum(math.exp(side[token]) for token in both), 1e-9) for side in (wanted, found)]
    return total + rest[0] * math.log(rest[0] / rest[1])


@app.command()
def quality(
    limit: Annotated[int, typer.Option(help="Examples per task and length.")] = 1,
    lengths: Annotated[list[int] | None, typer.Option(help="Tokens of the contexts.")] = None,
    task: Annotated[list[str] | None, typer.Option("-t", "--task")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model and its cache.")] = "bfloat16",
    answer: Annotated[int, typer.Option(help="Tokens of the answer that are compared.")] = 6,
    way: Annotated[list[str] | None, typer.Option(help="Ways of erasing; default all.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = DEFAULT_BACKBONE,
    eraser: Annotated[
        Path | None, typer.Option(help="Folder of an eraser with probes; default the one that ships.")
    ] = None,
    url: Url = None,
    output: Output = None,
) -> None:
    """KL to full recomputation, per way of erasing. With --output, a run that was cut off goes on where it was."""
    names = tuple(task or ("needle", "document-qa", "injection"))
    options = EvalOptions(names, tuple(lengths or (500,)), PROTOCOLS, (as_method("kveraser"),), limit)
    other = "" if model == DEFAULT_BACKBONE else f"{Path(model).name}_"
    file, environment = f"vllm_quality_{other}{dtype}", facts(dtype, model)
    rows = earlier(output, file)
    ways = {name: WAYS[name] for name in way or WAYS}
    with server(url, dtype, model=model, eraser=eraser) as address:
        tokenizer = VLLMSession(address).tokenizer
        filler = Filler(read_passages(), lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        for drawn in draw(options, filler):
            for protocol in PROTOCOLS:
                row = of_context(rows, drawn, protocol)
                missing = {name: options for name, options in ways.items() if name not in row["methods"]}
                if not missing:
                    continue
                row["tokens"], found = _distances(address, tokenizer, drawn.example, protocol, answer, missing)
                row["methods"] |= found
                rows += [] if row in rows else [row]
                print(row, flush=True)
                record(file, rows, environment, output)
    summarise(file, {"rows": rows, "environment": environment}, output)


def _distances(
    address: str, tokenizer: Any, example: Any, protocol: str, answer: int, ways: dict[str, Way]
) -> tuple[int, dict[str, dict[str, float]]]:
    """One example: its tokens; the distance that every way leaves, and the milliseconds that it takes."""

    def context(**options: Any) -> tuple[VLLMSession, Span, list[int]]:
        session, span = VLLMSession(address, tokenizer=tokenizer, **options), None
        for text, erased in example.parts:
            part = session.append(text)
            span = part if erased else span
        assert span is not None
        question = session._encode(example.question)
        if protocol == "query_cached":
            session.append(question)
            question = []
        return session, span, question

    session, span, question = context()
    ids = list(session._state.ids)
    exact = asking(session, [*ids[: span.start], *ids[span.end :]], None, None)
    said: list[int] = []
    wanted = []
    while len(said) < answer:
        wanted.append(exact([*question, *said]))
        said.append(max(wanted[-1], key=wanted[-1].__getitem__))
    found: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        session, span, question = context(**(way if isinstance(way, dict) else {}))
        started = time.perf_counter()
        if isinstance(way, int):
            ask = shifted(session, span, way)
        else:
            if way is not None:
                session.erase(span)
            ask = of_session(session)
        spent = time.perf_counter() - started
        distances = (divergence(each, ask([*question, *said[:count]])) for count, each in enumerate(wanted))
        found[name] = {"kl": round(statistics.mean(distances), 6), "ms": round(1000 * spent)}
        session.close()
    return len(ids), found


@app.command()
def sessions(
    count: Annotated[list[int] | None, typer.Option(help="Sessions that erase at the same time.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each context.")] = 300,
    span_tokens: Annotated[int, typer.Option(help="Tokens of each span, at a quarter of the context.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measurements of each; the median is told.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the model and its cache.")] = "bfloat16",
    url: Url = None,
    output: Output = None,
) -> None:
    """Milliseconds of an erase by number of sessions, together and one by one; the contexts were read before."""
    counts = tuple(count or (1, 2, 4, 8))
    document = {"benchmark": "vllm_sessions", "environment": facts(dtype)}
    rows: list[dict[str, Any]] = []
    with server(url, dtype, max(counts)) as address:
        tokenizer = VLLMSession(address).tokenizer
        text = tokenizer.encode(" ".join(read_passages()[:200]), add_special_tokens=False)
        taken = 0

        def fresh(number: int) -> list[tuple[VLLMSession, Span]]:
            nonlocal taken
            made = []
            for _ in range(number):
                ids = [text[(taken + place) % len(text)] for place in range(tokens)]
                taken += tokens
                session, start = VLLMSession(address, tokenizer=tokenizer), tokens // 4
                session.append(ids)
                session.complete(max_new_tokens=1)
                made.append((session, Span(start, start + span_tokens)))
            return made

        for number in counts:
            times: dict[str, list[float]] = {"together": [], "one by one": []}
            for turn in range(repeats + (number == counts[0])):  # the very first one warms up
                for way, seconds in times.items():
                    erases = fresh(number)
                    started = time.perf_counter()
                    if way == "together":
                        done = erase_together(erases)
                    else:
                        done = [session.erase(span) for session, span in erases]
                    spent = time.perf_counter() - started
                    for one in done:
                        if isinstance(one, kv.errors.KVEraserError):
                            raise one
                    if turn or number != counts[0]:
                        seconds.append(1000 * spent / number)
                    for session, _ in erases:
                        session.close()
            typical = {way: statistics.median(seconds) for way, seconds in times.items()}
            rows.append({
                "sessions": number, "context": tokens, "span": span_tokens, "repeats": repeats, "together_ms": typical["together"],
                "one_by_one_ms": typical["one by one"], "ratio": typical["together"] / typical["one by one"], "milliseconds": times,
            })  # fmt: skip
            print(rows[-1], flush=True)
            write_json("vllm_sessions", {**document, "rows": rows}, output)
    table = table_of(
        ["sessions"],
        ("runs", "together, ms per erase", "one by one, ms per erase", "ratio"),
        title=f"contexts of {tokens} tokens, a span of {span_tokens}, medians",
    )
    for row in rows:
        table.add_row(
            str(row["sessions"]),
            str(row["repeats"]),
            f"{row['together_ms']:.0f}",
            f"{row['one_by_one_ms']:.0f}",
            f"{row['ratio']:.2f}",
        )
    report_table("vllm_sessions", {**document, "rows": rows}, table, output)


if __name__ == "__main__":
    app()
