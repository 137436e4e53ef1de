"""`kveraser export`: the eraser as a GGUF adapter or a plain PEFT folder, and its backbone as GGUF."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli import options as opt
from kveraser.cli.common import print_json, reported, stderr, stdout
from kveraser.eraser import shipped_erasers
from kveraser.errors import BackboneError
from kveraser.export import write_gguf_backbone, write_gguf_eraser, write_peft_folder
from kveraser.model.backbone import DEFAULT_BACKBONE, embedded_gguf

app = typer.Typer(
    no_args_is_help=True,
    help="Write an eraser, or its backbone, in other programs' formats. Example: kveraser export gguf eraser.gguf",
)


class Float(StrEnum):
    """How matrices are stored."""

    F32 = "f32"
    F16 = "f16"


EraserFolder = Annotated[
    Path | None,
    typer.Option("--eraser", "-e", help="Folder of an eraser; default the one that ships for the embedded model."),
]


def _folder(eraser: Path | None) -> Path:
    return eraser or shipped_erasers()[DEFAULT_BACKBONE]


@app.command("gguf")
def gguf_command(
    output: Annotated[Path, typer.Argument(help="File to write.")],
    eraser: EraserFolder = None,
    dtype: Annotated[Float, typer.Option(help="Of the matrices.")] = Float.F32,
    as_json: opt.Json = False,
) -> None:
    """Write an eraser as a GGUF LoRA adapter for llama.cpp, and check it by reading it back.

    Window, repair, the backbone's fingerprint and the checksum of the source are in its metadata.

    Example: kveraser export gguf eraser.gguf
    """
    with reported(as_json):
        made = write_gguf_eraser(_folder(eraser), output, dtype=dtype.value)
        found = {
            "file": str(output),
            "bytes": output.stat().st_size,
            "architecture": made.architecture,
            "modules": made.modules,
            "rank": made.rank,
            "window": None if made.config.window is None else list(made.config.window),
            "repair": made.config.repair,
            "source_sha256": made.source_sha256,
        }
        if as_json:
            print_json(found)
            return
        stdout.print(
            f"{output}: {made.modules} modules of rank {made.rank}, window {made.config.window}, ",
            end="",
            soft_wrap=True,
        )
        stdout.print(
            f"repair {made.config.repair}, {found['bytes']} bytes\nmade from {made.source_sha256}", soft_wrap=True
        )


@app.command("peft")
def peft_command(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    eraser: EraserFolder = None,
    as_json: opt.Json = False,
) -> None:
    """Write an eraser as a plain PEFT folder, and check it by reading it back. The weights are copied byte for byte.

    Example: kveraser export peft eraser-peft
    """
    with reported(as_json):
        made = write_peft_folder(_folder(eraser), output)
        if as_json:
            print_json({"folder": str(output), "modules": len(made.weights), "sha256": made.sha256})
            return
        stdout.print(f"{output}: {len(made.weights)} modules, weights {made.sha256}", soft_wrap=True)


@app.command("backbone")
def backbone_command(
    output: Annotated[Path, typer.Argument(help="File to write.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A .gguf file, or the embedded default.")
    ] = DEFAULT_BACKBONE,
    dtype: Annotated[Float, typer.Option(help="Of the matrices; vectors stay f32.")] = Float.F16,
    as_json: opt.Json = False,
) -> None:
    """Write a GGUF file with the de-quantised weights of another one: those that transformers computes with.

    Example: kveraser export backbone smollm2-f16.gguf --dtype f16
    """
    with reported(as_json):
        source = embedded_gguf() if model == DEFAULT_BACKBONE else Path(model)
        if not source.is_file():
            raise BackboneError(f"there is no GGUF file {source}")
        with stderr.status(f"de-quantising {source.name} ..."):
            made = write_gguf_backbone(source, output, dtype=dtype.value)
        if as_json:
            print_json({"file": str(output), **made})
            return
        stdout.print(f"{output}: {made['tensors']} tensors, {made['bytes']} bytes", soft_wrap=True)
