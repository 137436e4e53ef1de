"""Prometheus gauges that are asked for when somebody reads them.

Knows: names and numbers. Does not know what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Gauge = tuple[str, str, float]
"""Name, what it is, number."""


class Gauges(Collector):
    """Gauges of something that goes on; `now` tells them."""

    def __init__(self, now: Callable[[], Iterable[Gauge]]) -> None:
        self.now = now

    def collect(self) -> Iterator[Metric]:
        for name, text, value in self.now():
            yield GaugeMetricFamily(name, text, value)
