"""The layout of `src`: which room may import from which, and that every room and module says what it is."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kveraser

SOURCE = Path(kveraser.__file__).parent
ROOMS = ("errors", "interrupts", "files", "extensions", "spans", "model", "cache", "readers", "eraser", "methods", "edit", "context",
         "tasks", "export", "evaluation", "training", "demo", "serving", "engines", "cli", "__main__")  # fmt: skip
"""From below to above: a room may import from those before it. CONTRIBUTING.md shows the same list."""


def module_name(file):
    return ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imported(name, *, later=False):
    """The modules of ours that a module needs when it is imported; with `later`, also those that its functions import."""
    found = set()
    for node in _statements(ast.parse(MODULES[name].read_text(encoding="utf-8")), later):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module for module in inner if module in MODULES} or {node.module}
    return {module for module in found if module in MODULES}


def _statements(tree, later):
    """What runs, but for what is there for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if later or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _statements(node, later)


def room(name):
    return name.split(".")[1] if "." in name else None


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_no_module_imports_from_a_room_above_its_own(name):
    above = {
        other
        for other in imported(name, later=True)
        if room(other) and ROOMS.index(room(other)) > ROOMS.index(room(name))
    }
    assert not above, f"{name} imports from above: {', '.join(sorted(above))}"


def test_no_imports_run_in_a_circle():
    graph = {  # a module does not wait for what the package around it offers
        name: {other for other in imported(name) if not name.startswith(f"{other}.")} - {name, "kveraser"}
        for name in MODULES
    }
    list(TopologicalSorter(graph).static_order())


def test_contributing_shows_the_rooms_in_this_order():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text.split("## Where things are")[1].split("```")[1]
    names = [name.strip() for name in shown.replace("\n", ",").replace("<-", ",").split(",")]
    assert [name for name in names if name] == list(ROOMS[:-1])


SERVING = ("beside", "exposure", "fields", "invalid", "decoding", "worker", "stopping", "contexts", "options", "completion", "service", "error_forms", "errors", "chat", "waiting", "events", "access",
           "metrics", "openai", "anthropic", "sessions", "page", "app")  # fmt: skip
"""The rooms and files of the server, from below to above."""


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("kveraser.serving.")])
def test_no_module_of_the_server_imports_from_above_its_own(name):
    place = SERVING.index(name.split(".")[2])
    others = {other.split(".")[2] for other in imported(name, later=True) if other.startswith("kveraser.serving.")}
    assert [other for other in others if SERVING.index(other) > place] == []
    assert len({name.split(".")[2], *others} & {"openai", "anthropic", "sessions"}) < 2 or name.endswith(".app"), (
        "the APIs do not know each other"
    )


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("kveraser.serving")])
def test_every_module_of_the_server_says_what_it_knows_and_what_it_does_not(name):
    text = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert "Knows: " in text
    assert "oes not know" in text


@pytest.mark.parametrize("name", MODULES)
def test_every_module_begins_with_what_it_is(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
