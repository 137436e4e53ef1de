"""Options that several commands have, as the types of their arguments: `model: opt.Model = opt.DEFAULT_MODEL`.

Knows: typer, what users are told of each. Does not know any command.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.readers import HOW_MANY, LEAST_READERS

DEFAULT_MODEL = DEFAULT_BACKBONE
DEFAULT_READERS = str(LEAST_READERS)

Model = Annotated[str, typer.Option("--model", "-m", help="Embedded default, hub id, folder or .gguf file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default bf16 where the device computes in it.")]
Eraser = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of an eraser; default the one that ships where it is better, else a neutral one."
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", "-M", help="Method, or NAME:OPTION=VALUE,...; repeatable; see `kveraser methods`."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

# Of commands that listen.
Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need an API key.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]
Policy = Annotated[str, typer.Option(help="exact, kveraser or auto, for requests that name none.")]
Readers = Annotated[
    str,
    typer.Option(
        help="Readers of what was there that a request's change recomputes; length: "
        f"{HOW_MANY}, which leaves less and takes longer. A trained eraser has its own number."
    ),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(help="Let this key in; repeatable. Better: KVERASER_API_KEYS=key1,key2, which `ps` does not show."),
]
BodyLimit = Annotated[str, typer.Option(help="Longest request.")]
