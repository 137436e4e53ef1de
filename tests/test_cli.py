"""The command line, with a tiny model in place of the real one."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import kveraser as kv
from conftest import build, make_config, make_tokenizer, random_eraser, text_model
from kveraser.cli import app
from kveraser.demo import latency, stories

runner = CliRunner()
COMMANDS = ("demo", "erase", "eval", "methods", "doctor", "train")


@pytest.fixture
def tiny_backbone(monkeypatch):
    def load(name, *, device=None, dtype=None, **_):
        if name == "missing":
            raise kv.BackboneError("cannot load 'missing'")
        if name == "dynamic":
            return build(
                make_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
            ), None
        return text_model(), make_tokenizer()

    for module in ("common", "doctor"):
        monkeypatch.setattr(f"kveraser.cli.{module}.load_backbone", load)


@pytest.fixture
def context_file(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("the door is blue. the code is 1234. the car is fast and it is blue.")
    return str(file)


@pytest.fixture
def eraser_folder(tmp_path):
    return str(random_eraser(text_model()).save_pretrained(tmp_path / "eraser"))


def run(*arguments):
    return runner.invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example: kveraser" in " ".join(result.output.split())


def test_the_version_is_printed():
    assert run("--version").output.strip() == kv.__version__


def test_methods_are_listed_in_a_table_and_as_json():
    table, data = run("methods").output, json.loads(run("methods", "--json").output)
    assert list(data) == list(kv.methods())
    assert all(name in table for name in data)
    assert data["local-suffix-repair"]["options"] == {"tokens": "32"}


def test_erase_compares_all_methods(tiny_backbone, context_file, eraser_folder):
    result = run(
        "erase", "-c", context_file, "-s", "the code is 1234.", "-a", "what?", "--eraser", eraser_folder, "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["erased"].strip() == "the code is 1234."
    assert [row["method"] for row in data["results"]] == list(kv.methods())
    exact = next(row for row in data["results"] if row["method"] == "full-recompute")
    assert exact["exact"]
    assert exact["kl"] == pytest.approx(0, abs=1e-4)


def test_erase_prints_a_table_without_an_eraser_too(tiny_backbone, context_file):
    result = run("erase", "-c", context_file, "-s", "2:5", "-a", "what?", "--cached")
    assert result.exit_code == 0, result.output
    assert "delete-and-shift" in result.output
    assert "kveraser" not in result.output.split("method")[1]


def test_erase_reads_standard_input(tiny_backbone):
    result = runner.invoke(
        app, ["erase", "-c", "-", "-s", "0:2", "-a", "what?", "-M", "full-recompute"], input="the code is 1234"
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-s", "nowhere"], "SpanError"),
        (["-s", "3:900"], "SpanError"),
        (["-s", "7:3"], "SpanError"),
        (["-s", "blue"], "SpanError"),
        (["-s", "0:2", "-M", "forget"], "OptionError"),
        (["-s", "0:2", "-M", "kveraser"], "EraserMismatchError"),
        (["-s", "0:2", "--eraser", "./nothing"], "EraserMismatchError"),
        (["-s", "0:2", "-m", "missing"], "BackboneError"),
        (["-s", "0:2", "-c", "/no/such/file"], "OptionError"),
    ],
)
def test_bad_input_gives_a_named_error_and_exit_code_2(tiny_backbone, context_file, arguments, error):
    base = ["erase", "-a", "what?", *([] if "-c" in arguments else ["-c", context_file])]
    assert run(*base, *arguments).exit_code == 2
    result = run(*base, *arguments, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == error


def test_ctrl_c_gives_exit_code_130(tiny_backbone, context_file, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kveraser.cli.erase.compare_methods", stop)
    result = run("erase", "-c", context_file, "-s", "0:2", "-a", "what?")
    assert result.exit_code == 130
    assert "interrupted" in result.output


def test_the_demo_shows_every_method_in_every_story(tiny_backbone, eraser_folder, monkeypatch):
    monkeypatch.setattr(latency, "SUFFIXES", (64, 128))
    monkeypatch.setattr("kveraser.cli.demo.SUFFIXES", (64, 128))
    result = run("demo", "--eraser", eraser_folder)
    assert result.exit_code == 0, result.output
    assert "growth" in result.output
    data = json.loads(run("demo", "--eraser", eraser_folder, "--no-latency", "--json").stdout)
    assert [story["story"] for story in data["stories"]] == [story.name for story in stories.stories()]
    for story in data["stories"]:
        for protocol in ("query_after", "query_cached"):
            assert [row["method"] for row in story[protocol]] == list(kv.methods())
        assert story["erased"] in result.output


def test_doctor_shows_the_environment_and_what_works(tiny_backbone):
    data = json.loads(run("doctor", "--json").output)
    assert data["environment"]["kveraser"] == kv.__version__
    assert "torch" in run("doctor").output
    data = json.loads(run("doctor", "-m", "tiny", "--json").output)
    assert data["methods"]["delete-and-shift"] == "yes"
    assert "needs an eraser" in data["methods"]["kveraser"]
    refused = run("doctor", "-m", "dynamic")
    assert refused.exit_code == 1
    assert "dynamic-NTK" in " ".join(refused.output.split())


def test_train_writes_an_eraser(tiny_backbone, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The car number {n} is blue and fast. It has a door with a code." for n in range(30)))
    result = run("train", "-o", str(tmp_path / "out"), "--examples", "4", "--text", str(text), "--window", "2,8")
    assert result.exit_code == 0, result.output
    assert kv.KVEraser.from_pretrained(tmp_path / "out" / "best", text_model()).window == (2, 8)
    again = run(
        "train",
        "-o",
        str(tmp_path / "more"),
        "--examples",
        "4",
        "--text",
        str(text),
        "--start",
        str(tmp_path / "out" / "best"),
    )
    assert again.exit_code == 0, again.output
    assert run("train", "-o", str(tmp_path / "x"), "--window", "wide").exit_code == 2


def test_eval_averages_every_method_over_held_out_examples(tiny_backbone, tmp_path, eraser_folder):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The car number {n} is blue and fast. It has a door with a code." for n in range(30)))
    common = [
        "eval",
        "--limit",
        "2",
        "--text",
        str(text),
        "--prefix",
        "4",
        "12",
        "--suffix",
        "4",
        "12",
        "--eraser",
        eraser_folder,
    ]
    data = json.loads(run(*common, "--json").stdout)
    rows = [row for row in data["rows"] if row["task"] == "all" and row["protocol"] == "query_after"]
    assert [row["method"] for row in rows] == list(kv.methods())
    assert all(row["examples"] == 8 for row in rows)
    table = run(*common, "-t", "needle", "-M", "full-recompute")
    assert "query_cached" in table.output
    assert run(*common, "-t", "haystack").exit_code == 2
