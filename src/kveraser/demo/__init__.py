"""The demo: stories, and a quick look at latency, on a real model."""
