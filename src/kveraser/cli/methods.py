"""`kveraser methods`: the registry as a table."""

from __future__ import annotations

from rich.table import Table

from kveraser.cli import options as opt
from kveraser.cli.common import print_json, stdout
from kveraser.methods import EraseMethod, methods, text_options, write_value


def _options(method: type[EraseMethod]) -> dict[str, str]:
    return {name: write_value(default) for name, default in text_options(method).items()}


def methods_command(as_json: opt.Json = False) -> None:
    """List the erasing methods.

    Wherever a method is named, options can be given: local-suffix-repair:tokens=64, kveraser:window=4,128,repair=32.

    Example: kveraser methods --json
    """
    if as_json:
        print_json(
            {
                name: {"summary": m.summary, "exact": m.exact, "needs_eraser": m.needs_eraser, "options": _options(m)}
                for name, m in methods().items()
            }
        )
        return
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("method", "what it does", "exact", "options"):
        table.add_column(column, no_wrap=column == "method")
    for name, method in methods().items():
        options = ", ".join(f"{key}={value}" for key, value in _options(method).items())
        table.add_row(name, method.summary, "yes" if method.exact else "", options)
    stdout.print(table)
