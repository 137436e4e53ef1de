"""Comparing erasing methods: metrics, all methods side by side on one example, and on many with intervals and plots.

Knows: methods, contexts, tasks, statistics. Does not know how an erase works, or about the terminal.
"""

from kveraser.evaluation.compare import PROTOCOLS, MethodResult, Protocol, compare_methods, read_parts
from kveraser.evaluation.erratum import Errata, Erratum
from kveraser.evaluation.metrics import agreement, exact_match, f1, kl_divergence, leaks, log_probability
from kveraser.tasks.answers import normalise

__all__ = [
    "PROTOCOLS",
    "Errata",
    "Erratum",
    "MethodResult",
    "Protocol",
    "agreement",
    "compare_methods",
    "exact_match",
    "f1",
    "kl_divergence",
    "leaks",
    "log_probability",
    "normalise",
    "read_parts",
]
