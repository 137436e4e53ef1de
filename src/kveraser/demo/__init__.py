"""The demo: stories, and a quick look at latency, on a real model.

Knows: contexts, comparing, texts of its own. Does not know about the terminal.
"""
