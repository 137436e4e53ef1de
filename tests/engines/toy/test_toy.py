"""The toy engine stands for the recipe "Add an engine": short, and nothing that a backend must have is missing from the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy

import kveraser as kv
from kveraser.cache import Backend, Can, Tokens
from kveraser.context import LiveBackend


def test_it_is_shorter_than_150_lines():
    assert len(Path(toy.__file__).read_text(encoding="utf-8").splitlines()) < 150


def test_the_recipe_names_everything_that_an_engine_writes():
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text.split("## Add an engine")[1].split("\n## ")[0]
    written = {name for name in vars(toy.ToyBackend) if not name.startswith("_") and hasattr(LiveBackend, name)}
    assert written >= LiveBackend.__abstractmethods__
    missing = {name for name in written | {can.name for can in Can} if f"`{name}" not in recipe}
    assert not missing


@pytest.mark.parametrize("verb", ["delete", "recompute", "rewrite", "look"])
def test_what_is_not_declared_is_refused_by_name(verb):
    class Plain(toy.ToyBackend):
        can = frozenset()

    arguments = {"delete": ((),), "recompute": (kv.Span(0, 1),), "rewrite": ((), ()), "look": (kv.Span(0, 1), 0)}[verb]
    with pytest.raises(kv.OptionError, match="toy cannot"):
        getattr(Backend, verb)(Plain(), Tokens(torch.ones(1, 1, dtype=torch.long)), *arguments)
