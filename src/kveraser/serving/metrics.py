"""Prometheus metrics.

Knows: the service's numbers. Does not know about requests' contents.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kveraser.serving.completion import Reply
from kveraser.serving.errors import error_response
from kveraser.serving.service import Service


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "kveraser_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
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
        self.registry.register(_Gauges(service))

    def count(self, reply: Reply) -> None:
        """Enter an answered request."""
        self.tokens.labels("reused").inc(reply.reuse.tokens_reused)
        self.tokens.labels("recomputed").inc(reply.reuse.tokens_recomputed)
        self.replies.labels(reply.reuse.method, str(reply.reuse.exact).lower()).inc()
        self.generated.inc(reply.completion_tokens)
        self.prompt_seconds.observe(reply.reuse.seconds)


class _Gauges(Collector):
    """The last numbers that the service has published."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        numbers = self.service.numbers  # the store itself belongs to the worker's thread
        for name, text, value in (
            ("kveraser_queue_waiting", "Requests that wait.", self.service.worker.waiting),
            ("kveraser_replies_in_the_making", "Replies that take turns.", self.service.worker.taking_turns),
            ("kveraser_cache_bytes", "Keys and values in memory.", numbers.bytes),
            ("kveraser_cache_budget_bytes", "Keys and values that may be in memory.", numbers.budget),
            ("kveraser_contexts_in_memory", "Contexts in memory.", numbers.in_memory),
            ("kveraser_contexts_on_disk", "Contexts on disk only.", numbers.on_disk),
        ):
            yield GaugeMetricFamily(name, text, value)


class CountRequests:
    """Counts requests by route and status. What no handler expected is answered here, so that no traceback with a prompt
    in it reaches a log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            response = error_response(error, scope["path"])
            if not status:
                await response(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # the pattern: a path itself may name a session
            self.metrics.requests.labels(path, str(status)).inc()
