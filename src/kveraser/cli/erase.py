"""`kveraser erase`: erase or replace a span of a context in a file and ask a question, by every method side by side."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kveraser.cli import options as opt
from kveraser.cli.common import find_eraser, load, print_json, progress_bar, reported, stderr, stdout
from kveraser.cli.tables import heat_line, results_table, top_readers
from kveraser.context import ErasableContext
from kveraser.demo.tell import who_read
from kveraser.errors import OptionError
from kveraser.evaluation import compare_methods
from kveraser.methods import EraseMethod, as_method
from kveraser.methods import methods as all_methods
from kveraser.readers import HOW_MANY, readers_for
from kveraser.spans import Span
from kveraser.tasks import ask as framed

_RANGE = re.compile(r"(\d+):(\d+)")


def read_context(file: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        if file != "-":
            return Path(file).read_text(encoding="utf-8")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        named = "standard input" if file == "-" else file
        raise OptionError(f"cannot read the context from {named}: {error}") from error


def parse_span(text: str, context: str) -> Span | str:
    """`START:END` in tokens, or a text that occurs in the context.

    Raises:
        OptionError: it is both, as a time of day may be.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        return text
    if re.search(rf"(?<!\d){text}(?!\d)", context):
        raise OptionError(
            f"--span {text} is a range of tokens, and also stands in the context. For the text, give some of what is around "
            f"it, too; for the tokens, write 0{text}"
        )
    return Span(int(match[1]), int(match[2]))


def named_methods(names: list[str] | None) -> list[EraseMethod]:
    """The methods that were named."""
    return [as_method(name) for name in names or ()]


def all_at(tokens: int) -> list[EraseMethod]:
    """Every method, at the same number of recomputed tokens."""
    return [method().with_budget(tokens) for method in all_methods().values()]


def erase_command(
    context: Annotated[str, typer.Option("--context", "-c", help="Text file with the context; - for standard input.")],
    span: Annotated[
        str,
        typer.Option(
            "--span",
            "-s",
            help="Text that occurs once in it, or START:END in tokens; what is both, such as a time of day, is refused.",
        ),
    ],
    ask: Annotated[str, typer.Option("--ask", "-a", help="Question to ask behind the context.")],
    replace: Annotated[
        str | None,
        typer.Option("--replace", "-r", help="Text that the span is to say instead; without it, it is erased."),
    ] = None,
    methods: opt.Methods = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Recomputed tokens behind the span, where no methods are named; default {HOW_MANY}.",
        ),
    ] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    eraser: opt.Eraser = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    cached: Annotated[bool, typer.Option(help="The question is in the cache already when the span is erased.")] = False,
    raw: Annotated[bool, typer.Option(help="Put the question as it is, not as 'Question: ... Answer:'.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Erases per method; the time is their median.")] = 3,
    as_json: opt.Json = False,
) -> None:
    """Erase a span from a context (or with --replace, let it say something else) and ask a question, by one or several methods.

    "Left" is the receipt's own estimate: the share of the attention to the span that was not recomputed. The line of blocks
    shows who has read the span, from right behind it to the end of the context.

    Example: kveraser erase --context notes.txt --span "The code is 1234." --ask "What is the code?" -M kveraser
    """
    with reported(as_json):
        if replace == "":
            raise OptionError("--replace has no text; leave it away to erase the span")
        text = read_context(context)
        chosen = named_methods(methods)  # an unknown name is an error before anything is loaded
        where = parse_span(span, text)
        backbone, tokenizer = load(model, device, dtype, quiet=as_json)
        tool = find_eraser(eraser, backbone)
        live = ErasableContext(backbone, tokenizer, tool)
        with stderr.status("reading the context ..."):
            live.append(text)
        found = live.locate(where)
        chosen = chosen or all_at(tokens or sum(readers_for([found])))
        new = None if replace is None else live.fitted(where, replace)
        question = ask if raw else framed(ask)
        if cached:
            live.append(question)
        length = len(live)  # now: a replacement stays among what was ever said, also when it is undone
        words, read = who_read(live, [found])
        with progress_bar() as bar:
            task = bar.add_task("erasing", total=len(chosen))
            results = compare_methods(
                live, found, None if cached else question, chosen, max_new_tokens=max_new_tokens, min_new_tokens=1,
                new=new, repeats=repeats,
                done=lambda _: bar.advance(task),
            )  # fmt: skip
        if as_json:
            print_json(
                {
                    "model": model,
                    "tokens": length,
                    "span": [found.start, found.end],
                    "erased": live.text_of(found),
                    **({} if new is None else {"replaced_by": new}),
                    "question": ask,
                    "protocol": "query_cached" if cached else "query_after",
                    "readers": [{"text": text, "read": share} for text, share in zip(words, read, strict=True)],
                    "results": [result.as_dict() for result in results],
                }
            )
            return
        stdout.print(f"{length} tokens; {'erased' if new is None else 'replaced'} {found}: ", end="")
        stdout.print(repr(live.text_of(found)) + ("" if new is None else f" by {new!r}"), markup=False)
        stdout.print(results_table(results))
        if line := heat_line(read):
            stdout.print(f"who read it, of {len(read)} tokens behind it: [red]{line}[/]", highlight=False)
            stdout.print(f"[dim]most of all: {escape(top_readers(words, read))}[/]", highlight=False)
