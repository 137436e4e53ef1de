"""Comparing erasing methods: metrics on logits, and all methods side by side on one example."""

from kveraser.evaluation.compare import MethodResult, compare_methods
from kveraser.evaluation.metrics import exact_match, kl_divergence, leaks, normalise

__all__ = ["MethodResult", "compare_methods", "exact_match", "kl_divergence", "leaks", "normalise"]
