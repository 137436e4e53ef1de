"""The recipes of the erasers that ship: their commands are those that are recorded, and they run."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from conftest import make_tokenizer, text_model
from kveraser.cli import app
from kveraser.eraser import EraserConfig, shipped_erasers
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
        values = EraserConfig.read(Path(options(command, "--output")[0]) / "eraser" / "kveraser.json").values
        assert values == EraserConfig.read(shipped_erasers()[name] / "kveraser.json").values
    assert Path(options(calibrating, "--output")[0], "kveraser.json").is_file()
    assert calibrating[0] == "python"
    assert '"--output"' in (ROOT / calibrating[1]).read_text(encoding="utf-8")


def test_every_kind_of_command_of_the_gpu_recipe_runs_on_a_tiny_model(tmp_path, corpus, monkeypatch):
    def loaded(*arguments, **options):
        return text_model(), make_tokenizer()

    monkeypatch.setattr("kveraser.cli.common.load_backbone", loaded)
    monkeypatch.setattr("kveraser.load_backbone", loaded)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = commands("gpu", "--tiny", corpus, tmp_path, "some/tiny")
    assert [command[1] for command in found] == [*["train"] * 3, *["eval"] * 12, "benchmarks/latency.py"]
    first = {command[1]: command for command in reversed(found)}
    for program, *arguments in reversed(first.values()):
        if program == "python":
            spec = importlib.util.spec_from_file_location("latency", ROOT / arguments.pop(0))
            latency = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(latency)
            tool = typer.Typer()
            tool.command()(latency.main)
        done = CliRunner().invoke(app if program == "kveraser" else tool, arguments)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "tiny" / "steering" / "eraser" / "kveraser.json").is_file()
    assert list((tmp_path / "tiny" / "steering" / "eval" / "1K").iterdir())
    assert (tmp_path / "tiny" / "latency" / "latency.json").is_file()


def test_the_gpu_recipe_names_its_backbones_and_the_options_of_its_whole_runs_can_be_read():
    for command in commands("gpu", "text.json", "out"):
        if "train" in command:
            assert options(command, "--preset") == ["gpu"]
            read_config(preset="gpu", changes=options(command, "--set"))
    named = {options(command, "--model")[0] for command in commands("gpu", "text.json", "out")}
    assert named == {"qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct", "Qwen/Qwen3-8B"}


def test_a_recipe_without_a_text_says_what_it_needs():
    said = subprocess.run([ROOT / "recipes" / "smollm2-135m-instruct.sh"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "usage" in said.stderr
