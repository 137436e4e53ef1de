"""The layout of `src`: which room may import from which, and that every room and module says what it is."""

from __future__ import annotations

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kveraser
from kveraser.files import disk

SOURCE = Path(kveraser.__file__).parent
TESTS = Path(__file__).parent
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
    shown = text.split("## Where things are")[1].split("```")[1]  # the tree comes behind it
    names = [name.strip() for name in shown.replace("\n", ",").replace("<-", ",").split(",")]
    assert [name for name in names if name] == list(ROOMS[:-1])


SERVING = ("beside", "exposure", "fields", "invalid", "decoding", "together", "worker", "stopping", "contexts", "options", "completion", "service", "server", "error_forms", "errors", "chat", "waiting", "events", "access",
           "guarding", "gauges", "metrics", "openai", "anthropic", "sessions", "page", "app")  # fmt: skip
"""The rooms and files of the server, from below to above."""


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("kveraser.serving.")])
def test_no_module_of_the_server_imports_from_above_its_own(name):
    place = SERVING.index(name.split(".")[2])
    others = {other.split(".")[2] for other in imported(name, later=True) if other.startswith("kveraser.serving.")}
    assert [other for other in others if SERVING.index(other) > place] == []
    assert len({name.split(".")[2], *others} & {"openai", "anthropic", "sessions"}) < 2 or name.endswith(".app"), (
        "the APIs do not know each other"
    )


def opening(name):
    """The docstring of a module, as one line."""
    return " ".join((ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or "").split())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_knows_and_what_it_does_not_or_its_folder_does(name):
    said = opening(name)
    assert said
    if "Knows: " in said and re.search(r"Do(es)? not know|Does not import", said):
        return
    texts = [said, opening(name.rpartition(".")[0])] if "." in name else [said]
    assert any(re.search(r"Each ([\w']+ )?file knows .* It does not know", text) for text in texts), (
        f"{name} does not say what it knows and what it does not"
    )


def test_tests_lie_as_what_they_test_does():
    folders = {path.relative_to(TESTS) for path in TESTS.rglob("*") if any(path.glob("test_*.py"))}
    strange = {folder for folder in folders if not (SOURCE / folder).is_dir()} - {Path("engines/toy"), Path("clients")}
    assert not strange, f"there is no such folder in src: {', '.join(map(str, strange))}"
    # pytest puts the folder of a test on the path, and there a folder called vllm or llama_cpp would pass for the library.
    assert not list((TESTS / "engines").glob("*.py")), "tests of an engine go into its folder"


def test_every_error_is_in_one_file_and_in_the_tree_that_it_opens_with():
    drawn, path = [], []
    for line in (
        ast.get_docstring(ast.parse(MODULES["kveraser.errors"].read_text(encoding="utf-8")), clean=False) or ""
    ).splitlines():
        if found := re.fullmatch(r"    ([|+ -]*)(\w+Error)(?: \((\w+)\))?", line):
            path = [*path[: len(found[1]) // 4], found[2]]
            drawn.append((found[2], {*path[-2:-1], *([found[3]] if found[3] else [])} or {"Exception"}))
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
    classes = [
        (name, node) for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    written = [
        (name, node.name, {ast.unparse(base) for base in node.bases})
        for name, node in classes
        if node.name.endswith("Error")
    ]
    assert [name for name, *_ in written if name != "kveraser.errors"] == []
    assert [(node, bases) for _, node, bases in written] == drawn


def named(document, heading, block):
    """The first words of the lines of a block of a document, but for lines that go on."""
    text = (TESTS.parent / document).read_text(encoding="utf-8").split(heading)[1].split("```")[2 * block + 1]
    return [line.split()[0] for line in text.splitlines() if line and not line.startswith(" ")]


def test_contributing_names_every_room_and_its_folders():
    kept = (path for path in SOURCE.rglob("*") if path.is_dir() and "__pycache__" not in path.parts)
    folders = [f"{path.relative_to(SOURCE)}/" for path in kept if any(path.iterdir())]
    files = [path.name for path in SOURCE.glob("*.py") if path.stem in ROOMS and path.stem != "__main__"]
    named_there = {name for name in [*folders, *files] if not name.startswith("eraser/shipped")}  # data, not modules
    assert sorted(named("CONTRIBUTING.md", "## Where things are", 1)) == sorted(named_there)


def test_the_readme_has_a_line_for_every_file_and_folder_of_the_root():
    command = ["git", "-C", str(TESTS.parent), "ls-tree", "--name-only", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("this is no git repository")
    there = {f"{name}/" if (TESTS.parent / name).is_dir() else name for name in found.stdout.split()}
    assert set(named("README.md", "## The tree", 0)) | {"README.md"} >= there
    assert all((TESTS.parent / name).exists() for name in named("README.md", "## The tree", 0))


FILES = [name for name in MODULES if name.startswith(("kveraser.context", "kveraser.files", "kveraser.serving.contexts"))
         and name != "kveraser.files.disk"]  # fmt: skip
CHANGES = ("unlink", "rmdir", "mkdir", "write_bytes", "write_text", "touch", "chmod", "fchmod", "rename", "link", "fsync", "ftruncate",
           "symlink_to", "hardlink_to", "rmtree")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_sessions_are_changed_by_the_steps_that_tests_can_stop_at_and_nowhere_else(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {call.attr for call in called if isinstance(call, ast.Attribute)}
    assert not named & set(CHANGES)
    on_os = {
        ast.unparse(call)
        for call in called
        if ast.unparse(call) in ("os.replace", "os.write", "os.open", "open", "os.remove")
    }
    assert on_os <= ({"os.open"} if name == "kveraser.files.keys" else set())  # to read one that cannot be changed
    assert not any(isinstance(node, ast.ImportFrom) and node.module == disk.__name__ for node in ast.walk(tree)), (
        "by the module's name"
    )


def test_every_promise_in_the_docs_names_tests_that_are_there():
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "security.md").read_text(encoding="utf-8")
    table = text.split("## In one table")[1].split("| **not**")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 15
    for _, promised, _, named, _ in rows:
        found = re.findall(r"`(test_\w+\.py)::(test_\w+)`", named)
        assert found, f"no test is named for: {promised}"
        for file, name in found:
            (where,) = tests.rglob(file)
            assert re.search(rf"^def {name}\(", where.read_text(encoding="utf-8"), re.M), f"{file} has no {name}"
