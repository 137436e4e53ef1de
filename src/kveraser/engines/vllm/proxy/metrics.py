"""Prometheus metrics of the proxy.

Knows: counts. Does not know what requests say.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from kveraser.engines.vllm.proxy.conversations import Conversations
from kveraser.engines.vllm.proxy.replicas import Replicas
from kveraser.serving.gauges import Gauge, Gauges


class ProxyMetrics:
    """The metrics of one proxy."""

    def __init__(self, conversations: Conversations, replicas: Replicas) -> None:
        self.registry = registry = CollectorRegistry()
        self.replies = Counter(
            "kveraser_proxy_replies", "Chat replies by how the prompt got its states.", ("method",), registry=registry
        )
        self.erases = Counter("kveraser_proxy_erases", "Erases by how they ended.", ("outcome",), registry=registry)
        self.erase_seconds = Histogram("kveraser_proxy_erase_seconds", "What erases took.", registry=registry)
        self.failures = Counter(
            "kveraser_proxy_upstream_failures", "Requests that a server failed on.", ("replica",), registry=registry
        )
        self.refreshed = Counter(
            "kveraser_proxy_refreshed", "Edited contexts that were replaced by exact ones.", registry=registry
        )
        registry.register(Gauges(lambda: _numbers(conversations, replicas)))


def _numbers(conversations: Conversations, replicas: Replicas) -> list[Gauge]:
    edited = sum(entry.session is not None for entry in conversations)
    return [
        ("kveraser_proxy_conversations", "Conversations that are remembered.", len(conversations)),
        ("kveraser_proxy_remembered_tokens", "Token ids of them.", conversations.size),
        ("kveraser_proxy_edited", "Conversations with an edited context.", edited),
        ("kveraser_proxy_upstreams_up", "Servers that answer.", sum(each.is_up for each in replicas.all)),
        ("kveraser_proxy_in_flight", "Requests on the servers.", sum(each.in_flight for each in replicas.all)),
    ]
