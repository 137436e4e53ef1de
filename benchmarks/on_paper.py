"""What erasing should cost, on paper: floating-point operations and bytes per method, and the time they take at best.

    python benchmarks/on_paper.py [--context 32768 ...] [--span 64] [--json]

The roofline: a pass takes the larger of its operations over the device's rate and its bytes over the memory's. The numbers
of models and devices are public ones; `EFFICIENCY` of the peak is what dense layers reach. `docs/performance.md`
compares the predicted ratios with measured ones.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

EFFICIENCY = 0.5
SELECTED = 0.15
"""Share of the suffix that selective recomputation runs."""


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


def costs(shape: Shape, prefix: int, span: int, suffix: int, window: int = 516, repair: int = 32) -> dict[str, Cost]:
    """Every method's cost, by name, and the floor: the span's tokens on an empty cache."""
    visible = min(window, prefix)
    return {
        "floor": forward(shape, span, 0),
        "kveraser:repair=0": forward(shape, span, visible, steered=span),
        "kveraser": forward(shape, span + repair, visible, steered=span),
        "delete-and-shift": moving(shape, suffix),
        "local-suffix-repair": moving(shape, suffix) + forward(shape, min(repair, suffix), prefix),
        "selective-recompute": moving(shape, suffix) + forward(shape, int(SELECTED * suffix), prefix + suffix // 2),
        "full-recompute": forward(shape, suffix, prefix),
    }


def main(
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the context.")] = None,
    span: Annotated[int, typer.Option(help="Tokens of the span, at a quarter of the context.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print operations, bytes and the H100's time per method."""
    rows = []
    for model, shape in SHAPES.items():
        for length in context or [32_768, 131_072, 1_048_576]:
            prefix = length // 4
            found = costs(shape, prefix, span, length - prefix - span)
            exact = found["full-recompute"].seconds(H100)
            rows += [
                {"model": model, "context": length, "method": name, **asdict(cost),
                 "milliseconds": 1000 * cost.seconds(H100), "faster_than_recomputing": exact / cost.seconds(H100)}
                for name, cost in found.items()
            ]  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("model", "context", "method", title=f"a span of {span} tokens, on one H100 at best (roofline)")
    for title in ("TFLOP", "GB", "ms", "recompute /"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["model"], f"{row['context']:,}", row["method"], f"{row['operations'] / 1e12:.3g}",
                      f"{row['bytes'] / 1e9:.3g}", f"{row['milliseconds']:.3g}", f"{row['faster_than_recomputing']:.3g}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
