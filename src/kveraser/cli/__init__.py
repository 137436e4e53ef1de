"""The command line: one file per command.

Each file knows the options of its command, what the library offers for it, and how the answer looks in a terminal or in JSON. It
does not know how anything is computed; that is below.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="kveraser",
    help="Erase a span from a language model's context after it has been processed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _version(value: bool) -> None:
    if value:
        from kveraser import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _register() -> None:
    from kveraser.cli.demo import demo_command
    from kveraser.cli.doctor import doctor_command
    from kveraser.cli.erase import erase_command
    from kveraser.cli.eval import eval_command
    from kveraser.cli.export import app as export_app
    from kveraser.cli.methods import methods_command
    from kveraser.cli.proxy import proxy_command
    from kveraser.cli.serve import serve_command
    from kveraser.cli.train import app as train_app

    for name, command in (
        ("demo", demo_command),
        ("erase", erase_command),
        ("eval", eval_command),
        ("methods", methods_command),
        ("serve", serve_command),
        ("proxy", proxy_command),
        ("doctor", doctor_command),
    ):
        app.command(name)(command)
    app.add_typer(train_app, name="train")
    app.add_typer(export_app, name="export")


_register()
