"""A method and a task of another package: one file and one registration each, and they are everywhere."""

from __future__ import annotations

import json
import logging
import sys
import textwrap

import pytest
from typer.testing import CliRunner

import kveraser as kv
from conftest import build, make_config, make_tokenizer, prefill, text_model, token_ids
from kveraser import extensions
from kveraser.cli import app
from kveraser.evaluation.runner import default_methods
from kveraser.tasks import Task, as_task, tasks
from kveraser.training.config import read_config

METHOD = '''
    """Deletes, and says so: what CONTRIBUTING.md asks of a method, word for word."""

    from __future__ import annotations

    from dataclasses import dataclass
    from typing import ClassVar

    from kveraser.methods import DeleteAndShift


    @dataclass(frozen=True)
    class Vanish(DeleteAndShift):
        name: ClassVar[str] = "vanish"
        summary: ClassVar[str] = "delete-and-shift under another name"
'''
TASK = '''
    """A task of one sentence."""

    from __future__ import annotations

    from typing import ClassVar

    from kveraser.tasks import EraseExample, Task, ask


    class Colour(Task):
        name: ClassVar[str] = "colour"
        summary: ClassVar[str] = "a colour that is taken back"

        def make(self, rng, filler, sizes, split):
            colour = rng.choice(["red", "blue"] if split == "train" else ["green", "black"])
            before, behind = sizes.draw(rng)
            text = filler.text(rng, before, split), f"The car is {colour}. ", filler.text(rng, behind, split)
            return EraseExample(*text, ask("What colour is the car?"), None, colour)
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install modules as packages would be: files on the path, and what they register."""

    def install(entries, **modules):
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        about = tmp_path / "kveraser_more-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kveraser-more\nVersion: 1.0\n")
        groups = [f"[{group}]\n" + "\n".join(lines) for group, lines in entries.items()]
        (about / "entry_points.txt").write_text("\n".join(groups) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        extensions._registered.cache_clear()

    yield install
    monkeypatch.undo()
    extensions._registered.cache_clear()
    for name in ("more_methods", "more_tasks", "broken"):
        sys.modules.pop(name, None)


def test_a_method_of_another_package_is_in_every_list_and_erases(installed):
    installed({"kveraser.methods": ["vanish = more_methods:Vanish"]}, more_methods=METHOD)
    assert list(kv.methods())[-1] == "vanish"
    assert "vanish" in [method.name for method in default_methods()]
    model, ids = build(make_config("llama")), token_ids(40)
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(5, 9), method="vanish")
    assert (receipt.method, cache.get_seq_length()) == ("vanish", 36)
    kv.restore(cache, receipt)
    context = kv.ErasableContext(text_model(), make_tokenizer())
    context.append("one two ")
    span = context.append("three ")
    context.append("four five")
    assert context.erase(span, "vanish").method == "vanish"
    listed = CliRunner().invoke(app, ["methods", "--json"])
    assert "vanish" in json.loads(listed.stdout)


def test_a_task_of_another_package_can_be_evaluated_and_trained_on(installed):
    installed({"kveraser.tasks": ["colour = more_tasks:Colour"]}, more_tasks=TASK)
    assert list(tasks())[-1] == "colour"
    assert as_task("colour").name == "colour"
    assert read_config(changes=["finetune.tasks=[colour]"]).finetune.tasks == ("colour",)


@pytest.mark.parametrize(
    ("entry", "source", "said"),
    [
        ("bad = broken:Nothing", "raise RuntimeError('no GPU')", "cannot be loaded: RuntimeError: no GPU"),
        ("bad = broken:Nothing", "Nothing = 3", "is no class below EraseMethod"),
        ("bad = broken:Nothing", METHOD.replace("Vanish", "Nothing").replace('"vanish"', '"no-erase"'), "is taken"),
        ("bad = broken:Missing", "", "cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_passed_over_with_a_warning(installed, caplog, entry, source, said):
    before = kv.methods()
    installed({"kveraser.methods": [entry]}, broken=source)
    with caplog.at_level(logging.WARNING, "kveraser"):
        assert kv.methods() == before
    assert said in caplog.text


def test_a_task_is_no_method(installed, caplog):
    installed({"kveraser.methods": ["colour = more_tasks:Colour"]}, more_tasks=TASK)
    assert "colour" not in kv.methods()
    assert not issubclass(Task, kv.EraseMethod)
