"""The recipes of the erasers that ship: their commands are those that are recorded, and they run."""

from __future__ import annotations

import json
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import make_tokenizer, text_model
from kveraser.cli import app
from kveraser.eraser import shipped_erasers
from kveraser.training.config import read_config

ROOT = Path(__file__).parents[1]


def commands(name, *arguments):
    """What a recipe would run."""
    said = subprocess.run(
        [ROOT / "recipes" / f"{name}.sh", "--dry", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in said.stdout.splitlines()]


def options(command, name):
    return [value for key, value in pairwise(command) if key == name]


@pytest.mark.parametrize("name", shipped_erasers())
def test_every_eraser_that_ships_has_a_recipe_whose_last_run_is_the_recorded_one(name):
    made = json.loads((shipped_erasers()[name] / "kveraser.json").read_text(encoding="utf-8"))["notes"]
    last = [command for command in commands(name, "text.json", "out") if "train" in command][-1]
    found = read_config(changes=[*options(last, "--set"), f"seed={options(last, '--seed')[0]}"]).as_dict()
    recorded = made["training"]
    assert last[2] == made["stage"]
    assert found["seed"] == recorded["seed"]
    for part in ("eraser", made["stage"]):
        assert {key: found[part][key] for key in recorded[part]} == recorded[part]


@pytest.mark.parametrize("name", shipped_erasers())
def test_every_command_of_a_recipe_runs(name, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("kveraser.cli.common.load_backbone", lambda *_, **__: (text_model(), make_tokenizer()))
    *training, calibrating = commands(name, "--tiny", corpus, tmp_path)
    for command in training:
        assert command[:2] == ["kveraser", "train"]
        done = CliRunner().invoke(app, command[1:])
        assert done.exit_code == 0, done.output
        assert (Path(options(command, "--output")[0]) / "eraser" / "kveraser.json").is_file()
    assert Path(options(calibrating, "--output")[0], "kveraser.json").is_file()
    assert calibrating[0] == "python"
    assert '"--output"' in (ROOT / calibrating[1]).read_text(encoding="utf-8")


def test_a_recipe_without_a_text_says_what_it_needs():
    said = subprocess.run([ROOT / "recipes" / "smollm2-135m-instruct.sh"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "usage" in said.stderr
