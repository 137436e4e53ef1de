"""Prometheus metrics.

Knows: the service's numbers. Does not know about requests' contents.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from kveraser.serving.completion import Reply
from kveraser.serving.gauges import Gauge, Gauges
from kveraser.serving.service import Service


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.tokens = Counter(
            "kveraser_prompt_tokens", "Prompt tokens by how they got their states.", ("how",), registry=registry
        )
        self.replies = Counter(
            "kveraser_replies", "Replies by method and exactness.", ("method", "exact"), registry=registry
        )
        self.generated = Counter("kveraser_generated_tokens", "Tokens sampled.", registry=registry)
        self.prompt_seconds = Histogram(
            "kveraser_prompt_seconds", "Until the first token could be sampled.", registry=registry
        )
        self.registry.register(Gauges(lambda: _numbers(service)))

    def count(self, reply: Reply) -> None:
        """Enter an answered request."""
        self.tokens.labels("reused").inc(reply.reuse.tokens_reused)
        self.tokens.labels("recomputed").inc(reply.reuse.tokens_recomputed)
        self.replies.labels(reply.reuse.method, str(reply.reuse.exact).lower()).inc()
        self.generated.inc(reply.completion_tokens)
        self.prompt_seconds.observe(reply.reuse.seconds)


def _numbers(service: Service) -> list[Gauge]:
    """The last ones that the service has published."""
    numbers = service.numbers  # the store itself belongs to the worker's thread
    return [
        ("kveraser_queue_waiting", "Requests that wait.", service.worker.waiting),
        ("kveraser_replies_in_the_making", "Replies that take turns.", service.worker.taking_turns),
        ("kveraser_cache_bytes", "Keys and values in memory.", numbers.bytes),
        ("kveraser_cache_budget_bytes", "Keys and values that may be in memory.", numbers.budget),
        ("kveraser_contexts_in_memory", "Contexts in memory.", numbers.in_memory),
        ("kveraser_contexts_on_disk", "Contexts on disk only.", numbers.on_disk),
    ]
