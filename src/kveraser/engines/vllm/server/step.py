"""What the scheduler tells the workers with every step: states to load, states and queries to keep.

Knows: positions and blocks of requests. Does not know why they are loaded or kept. Instances travel between vLLM's processes as pickles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kveraser.engines.vllm.protocol import Piece, Save


@dataclass(frozen=True)
class Load:
    """For the workers: fill positions `[start, end)` of a request's blocks."""

    request: str
    pieces: tuple[Piece, ...]
    blocks: tuple[int, ...]
    start: int
    end: int
    refused: str | None


@dataclass(frozen=True)
class Keep:
    """For the workers: write the states of some positions into new entries."""

    saves: tuple[tuple[str, Save], ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Observe:
    """For the workers: keep the queries of the first `tokens` positions of a request, and write them when they are complete."""

    request: str
    entries: tuple[str, ...]
    blocks: tuple[int, ...]
    tokens: int


@dataclass
class Step(KVConnectorMetadata):
    """All that is to be done in one step."""

    loads: list[Load] = field(default_factory=list)
    keeps: list[Keep] = field(default_factory=list)
    observes: list[Observe] = field(default_factory=list)
