"""What erasing should cost, on paper: floating-point operations and bytes per method, and the time they take at best.

    python benchmarks/on_paper.py [--context 32768 ...] [--span 64] [--json] [--output FOLDER]

The roofline: a pass takes the larger of its operations over the device's rate and its bytes over the memory's. The numbers
of models and devices are public ones; `EFFICIENCY` of the peak is what dense layers reach. `docs/performance.md` shows the table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from measuring import report_table
from rich.table import Table

EFFICIENCY = 0.5
READERS = 64
"""Tokens behind the span that every method recomputes which recomputes some."""
CANDIDATES, LAYERS, RANK = 512, 5, 128
"""Of the look at who has read the span: tokens looked at closely, in so many layers, by maps of that rank."""
SHOWN = 2304
"""Slots that a reader is shown, about, of many: those it needs, samples of the others, and the nearest."""


@dataclass(frozen=True)
class Shape:
    """A decoder: sizes of its linear layers and of its K/V. `bytes` per number; `lora` parameters of a rank-16 eraser."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes: int = 2

    @property
    def weights(self) -> int:
        """Parameters of the linear layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def lora(self) -> int:
        """Parameters of a rank-16 LoRA on all of them."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + query) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return 16 * self.layers * sides

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes


@dataclass(frozen=True)
class Device:
    """Peak operations per second, and bytes per second of the memory."""

    operations: float
    bandwidth: float


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64),
    "Qwen3-8B": Shape(36, 4096, 12288, 32, 8, 128),
    "Llama-3-70B": Shape(80, 8192, 28672, 64, 8, 128),
}
H100 = Device(989e12, 3.35e12)


@dataclass(frozen=True)
class Cost:
    """Operations and bytes moved."""

    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def seconds(self, device: Device, devices: int = 1) -> float:
        """The roofline's time, the work divided evenly."""
        return max(self.operations / (EFFICIENCY * device.operations), self.bytes / device.bandwidth) / devices


def forward(shape: Shape, tokens: int, before: int, *, steered: int = 0, chunk: int = 8192) -> Cost:
    """Running tokens that attend to `before` cached ones and causally to themselves; `steered` of them with the LoRA."""
    if not tokens:
        return Cost(0, 0)
    linear = 2 * (shape.weights * tokens + shape.lora * steered)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * tokens * (before + tokens / 2)
    passes = -(-tokens // chunk)
    seen = sum(min(before + (index + 1) * chunk, before + tokens) for index in range(passes))
    moved = passes * shape.weights * shape.bytes + (seen + tokens) * shape.kv_bytes
    return Cost(linear + attention, moved + (shape.lora * shape.bytes if steered else 0))


def moving(shape: Shape, tokens: int) -> Cost:
    """Closing the gap: states of so many tokens are read and written, and their keys turned."""
    return Cost(6 * tokens * shape.kv_bytes / (2 * shape.bytes), 2 * tokens * shape.kv_bytes)


def looking(shape: Shape, prefix: int, span: int, suffix: int) -> Cost:
    """Telling who has read the span, and which keys they need: a thin look at the suffix, a close one at candidates, then every
    second reader against all keys."""
    wide, told = 2 * shape.kv_heads * shape.head_dim, max(3, shape.heads // 4) * shape.head_dim
    thin = 2 * suffix * (wide * RANK + RANK * told + told * (span + 84))
    close = 2 * LAYERS * CANDIDATES * (3 * wide * RANK + RANK * shape.heads * shape.head_dim)
    keys = 2 * LAYERS * READERS // 2 * shape.heads * shape.head_dim * (prefix + suffix)
    layer = shape.kv_bytes / shape.layers
    return Cost(thin + close + keys, layer * suffix + LAYERS * layer / 2 * (prefix + suffix))


def costs(shape: Shape, prefix: int, span: int, suffix: int, window: int = 516) -> dict[str, Cost]:
    """Every method's cost, by name, and the floor: the span's tokens on an empty cache."""
    few, shown = min(READERS, suffix), min(SHOWN, prefix + suffix)
    look, move = looking(shape, prefix, span, suffix), moving(shape, suffix)
    return {
        "floor": forward(shape, span, 0),
        "kveraser, trained:repair=0": forward(shape, span, min(window, prefix), steered=span),
        "kveraser": look + forward(shape, few, shown),
        "attention-guided-repair": move + look + forward(shape, few, shown),
        "delete-and-shift": move,
        "local-suffix-repair": move + forward(shape, few, prefix),
        "selective-recompute": move + forward(shape, few, prefix + suffix // 2),
        "full-recompute": forward(shape, suffix, prefix),
    }


def main(
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the context.")] = None,
    span: Annotated[int, typer.Option(help="Tokens of the span, at a quarter of the context.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for on_paper.json and on_paper.md.")] = None,
) -> None:
    """Print operations, bytes and the H100's time per method."""
    rows, lengths = [], context or [1024, 32_768, 131_072]
    table = Table(
        "milliseconds",
        *(f"{length:,}" for length in lengths),
        title=f"a span of {span} tokens, on one H100 at best (roofline)",
    )
    for model, shape in SHAPES.items():
        found = {length: costs(shape, length // 4, span, length - length // 4 - span) for length in lengths}
        for method in found[lengths[0]]:
            times = [1000 * found[length][method].seconds(H100) for length in lengths]
            table.add_row(f"{model}, {method}", *(f"{time:,.3g}" if time < 1000 else f"{time:,.0f}" for time in times))
            rows += [
                {"model": model, "context": length, "method": method, **asdict(found[length][method]), "milliseconds": time,
                 "faster_than_recomputing": 1000 * found[length]["full-recompute"].seconds(H100) / time}
                for length, time in zip(lengths, times, strict=True)
            ]  # fmt: skip
    report_table("on_paper", {"benchmark": "on_paper", "rows": rows}, table, output, as_json)


if __name__ == "__main__":
    typer.run(main)
