"""The command line, with a tiny model in place of the real one."""

from __future__ import annotations

import copy
import json

import pytest
from typer.testing import CliRunner

import kveraser as kv
from conftest import build, make_config, make_tokenizer, random_eraser, text_model
from kveraser.cli import app
from kveraser.demo import latency, stories
from kveraser.evaluation import record
from kveraser.evaluation.runner import DEFAULT_BUDGET
from kveraser.methods.choosing import SIGHT
from kveraser.readers import HOW_MANY, RULE

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
    assert data["kveraser"]["options"] == {
        "window": "none", "full_prefix": "false", "repair": "none", "choose": "none", "coverage": "none", "block": "none",
        "keys": "512",
    }  # fmt: skip


def test_erase_compares_all_methods(tiny_backbone, context_file, eraser_folder):
    result = run(
        "erase", "-c", context_file, "-s", "the code is 1234.", "-a", "what?", "--eraser", eraser_folder, "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["erased"].strip() == "the code is 1234."
    assert [row["method"].partition(":")[0] for row in data["results"]] == list(kv.methods())
    assert len(data["readers"]) == data["tokens"] - data["span"][1]
    exact = next(row for row in data["results"] if row["method"] == "full-recompute")
    assert exact["exact"]
    assert exact["kl"] == pytest.approx(0, abs=1e-4)


def test_erase_takes_methods_with_options(tiny_backbone, context_file, eraser_folder):
    chosen = ["kveraser:repair=2", "local-suffix-repair:tokens=3"]
    common = ["erase", "-c", context_file, "-s", "2:5", "-a", "what?", "--eraser", eraser_folder, "--json"]
    data = json.loads(run(*common, "-M", chosen[0], "-M", chosen[1]).stdout)
    assert [row["method"] for row in data["results"]] == chosen
    assert [row["tokens_recomputed"] for row in data["results"]] == [5, 3]


def test_erase_replaces_what_is_to_say_something_else(tiny_backbone, context_file, eraser_folder):
    common = [
        "erase",
        "-c",
        context_file,
        "-s",
        "the code is 1234.",
        "-r",
        "it is 9.",
        "-a",
        "what?",
        "--eraser",
        eraser_folder,
    ]
    data = json.loads(run(*common, "-M", "full-recompute", "-M", "kveraser", "--json").stdout)
    assert data["replaced_by"].strip() == "it is 9."
    erased = json.loads(run(*common[:5], *common[7:], "-M", "no-erase", "--json").stdout)
    assert (data["tokens"], len(data["readers"])) == (erased["tokens"], len(erased["readers"]))
    assert [row["method"] for row in data["results"]] == ["full-recompute", "kveraser"]
    table = run(*common, "-M", "kveraser")
    assert "replaced [" in table.output


def test_erase_prints_a_table_with_the_neutral_eraser_where_none_is_given(tiny_backbone, context_file):
    result = run("erase", "-c", context_file, "-s", "2:5", "-a", "what?", "--cached")
    assert result.exit_code == 0, result.output
    assert "delete-and-shift" in result.output
    assert "kveraser" in result.output.split("method")[1]


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
        (["-s", "0:2", "-r", ""], "OptionError"),
        (["-s", "0:2", "-M", "local-suffix-repair:tokens=0"], "OptionError"),
        (["-s", "0:2", "-M", "kveraser:coverage=2.0"], "OptionError"),
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


@pytest.mark.long
def test_the_demo_shows_every_method_in_every_story(tiny_backbone, eraser_folder, monkeypatch):
    monkeypatch.setattr(latency, "SUFFIXES", (64, 128))
    monkeypatch.setattr("kveraser.cli.demo.SUFFIXES", (64, 128))
    monkeypatch.setattr(
        "kveraser.cli.demo.PAGES", 2
    )  # the tokenizer of the tests makes four times as many tokens of a page
    result = run("demo", "--eraser", eraser_folder)
    assert result.exit_code == 0, result.output
    assert "growth" in result.output
    assert "who read it" in result.output
    assert "Nearest to full recomputation" in result.output
    data = json.loads(run("demo", "--eraser", eraser_folder, "--no-latency", "--json").stdout)
    assert [story["story"] for story in data["stories"]] == [story.name for story in stories.stories()]
    for story in data["stories"]:
        for protocol in ("query_after", "query_cached"):
            names = [row["method"].partition(":")[0] for row in story[protocol]]
            assert names == [name for name, kind in kv.methods().items() if kind.compared]
            (suffix,) = {row["tokens_recomputed"] for row in story[protocol] if row["method"] == "full-recompute"}
            for row in story[protocol]:
                if kv.methods()[row["method"].partition(":")[0]].budget_option:
                    assert (
                        DEFAULT_BUDGET <= row["tokens_recomputed"] < suffix / 2
                    )  # with a trained eraser also the span
            assert suffix > 6 * DEFAULT_BUDGET
        assert len(story["readers"]) == story["tokens_behind"]
        assert story["erased"] in result.output


def test_doctor_shows_the_environment_and_what_works(tiny_backbone):
    data = json.loads(run("doctor", "--json").output)
    assert data["environment"]["kveraser"] == kv.__version__
    assert "torch" in run("doctor").output
    data = json.loads(run("doctor", "-m", "tiny", "--json").output)
    assert data["methods"]["delete-and-shift"] == "yes"
    assert "neutral eraser" in data["methods"]["kveraser"]
    assert "not rounded noticeably in float32" in data["model"]["moving keys"]
    assert "neutral eraser" in data["model"]["eraser"]
    assert data["model"]["readers"]
    refused = run("doctor", "-m", "dynamic")
    assert refused.exit_code == 1
    assert "dynamic-NTK" in " ".join(refused.output.split())


@pytest.fixture
def evaluate(tiny_backbone, tmp_path, eraser_folder):
    """`kveraser eval` on short contexts, with the given options."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The car number {n} is blue and fast. It has a door with a code." for n in range(30)))
    common = [
        "eval",
        "--limit",
        "2",
        "--lengths",
        "80",
        "--max-new-tokens",
        "3",
        "--text",
        str(text),
        "--eraser",
        eraser_folder,
    ]
    return lambda *more: run(*common, *more)


def test_eval_compares_the_methods_on_the_same_examples(evaluate):
    result = evaluate("-t", "needle", "-t", "injection", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    rows = [row for row in data["rows"] if row["task"] == "mean over tasks" and row["protocol"] == "query_cached"]
    assert [row["method"] for row in rows] == [
        "no-erase", "erratum", "full-recompute", "delete-and-shift", "local-suffix-repair:tokens=70", "selective-recompute:tokens=70",
        "attention-guided-repair:tokens=70", "kveraser:repair=0", "kveraser:repair=70",
    ]  # fmt: skip
    assert all(row["examples"] == 4 for row in rows)
    assert rows[2]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "count": 4}
    assert data["complete"]
    assert data["options"]["tasks"] == ["needle", "injection"]
    assert data["options"]["readers"] == f"{HOW_MANY}; {RULE}; {SIGHT}"
    assert data["environment"]["kveraser"] == kv.__version__
    assert data["eraser"]["rank"] == 4


def test_eval_asks_in_chat_form_and_says_so(evaluate, tmp_path, monkeypatch):
    result = evaluate("-t", "needle", "--chat", "-M", "erratum", "-M", "full-recompute", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "results.md").read_text()
    assert "in chat form" in page
    assert "quote" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["options"]["chat"] is True
    bare = copy.deepcopy(make_tokenizer())
    bare.chat_template = None
    monkeypatch.setattr("kveraser.cli.common.load_backbone", lambda name, **_: (text_model(), bare))
    refused = evaluate("-t", "needle", "--chat", "-o", str(tmp_path / "none"))
    assert refused.exit_code == 2
    assert "no chat template" in " ".join(refused.output.split())
    assert not (tmp_path / "none").exists()


def test_eval_compares_at_several_numbers_of_recomputed_tokens(evaluate):
    data = json.loads(evaluate("-t", "needle", "--tokens", "4", "--tokens", "8", "--json").stdout)
    labels = [row["method"] for row in data["rows"] if row["task"] == "needle" and row["protocol"] == "query_after"]
    assert labels.count("local-suffix-repair:tokens=4") == labels.count("local-suffix-repair:tokens=8") == 1
    assert [label for label in labels if label.startswith("kveraser")] == [
        f"kveraser:repair={tokens}" for tokens in (0, 4, 8)
    ]
    both = evaluate("-t", "needle", "--tokens", "4", "-M", "kveraser")
    assert both.exit_code == 2
    assert "--tokens is for when no --methods are named" in " ".join(both.output.split())


def test_eval_prints_a_table_of_means_and_on_request_one_for_every_task(evaluate):
    options = ["-t", "needle", "-t", "injection", "-M", "kveraser:repair=2", "-M", "full-recompute"]
    means = evaluate(*options)
    assert means.exit_code == 0, means.output
    shown = " ".join(means.output.split())  # a title is as wide as its table
    assert "kveraser:repair=2" in shown
    assert "question in the cache when erasing (4 examples)" in shown
    assert "needle, about" not in shown
    assert "needle, about 80 tokens" in evaluate(*options, "--per-task", "--protocols", "query_after").output


def test_eval_goes_on_where_it_was_interrupted(evaluate, tmp_path, monkeypatch):
    options = ["-t", "needle", "-M", "no-erase", "-M", "delete-and-shift", "-o", str(tmp_path / "out")]
    lines = tmp_path / "out" / "examples.jsonl"
    add = record.RecordLog.add

    def stop(self, entry):
        add(self, entry)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(record.RecordLog, "add", stop)
    interrupted = evaluate(*options)
    assert interrupted.exit_code == 130
    assert "3 of 8" in interrupted.output
    assert not json.loads((tmp_path / "out" / "results.json").read_text())["complete"]
    begun = lines.read_text()
    monkeypatch.setattr(record.RecordLog, "add", add)
    assert evaluate(*options).exit_code == 0
    assert lines.read_text().startswith(begun)
    assert len(lines.read_text().splitlines()) == 8
    assert json.loads((tmp_path / "out" / "results.json").read_text())["complete"]
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".json", ".jsonl", ".md", ".png"}
    other = evaluate(*options, "--seed", "5")
    assert other.exit_code == 2
    assert "--fresh" in other.output
    assert evaluate(*options, "--seed", "5", "--fresh").exit_code == 0


def test_parts_of_a_run_come_together_in_the_tables_of_the_whole(evaluate, tmp_path):
    options = ["-t", "needle", "-M", "no-erase", "-M", "delete-and-shift"]
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    for part in ("2/2", "1/2"):
        done = evaluate(*options, "-o", str(shared), "--part", part, "--json")
        assert done.exit_code == 0, done.output
        file = str(shared / f"examples.{part.replace('/', '-of-')}.jsonl")
        assert json.loads(done.stdout) == {"part": part, "file": file, "records": 4}
        assert not json.loads((shared / "results.json").read_text())["complete"]
    assert sorted(file.name for file in shared.glob("*.jsonl")) == ["examples.1-of-2.jsonl", "examples.2-of-2.jsonl"]
    assert {len(file.read_text().splitlines()) for file in shared.glob("*.jsonl")} == {4}
    rows = []
    for folder in (shared, alone):
        assert evaluate(*options, "-o", str(folder)).exit_code == 0
        found = json.loads((folder / "results.json").read_text())
        assert found["complete"]
        assert all((row["milliseconds"] is None) == (folder == shared) for row in found["rows"])
        rows.append([{**row, "milliseconds": None} for row in found["rows"]])
    assert rows[0] == rows[1]
    assert not (shared / "examples.jsonl").exists()
    assert not (shared / "quality_cost.png").exists()
    assert "ms" not in (shared / "results.md").read_text().split("| method |")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("part", "message"),
    [("3/2", "1/2 to 2/2"), ("0/2", "part 0 of 2"), ("half", "such as 2/4"), ("1/2", "needs --output")],
)
def test_a_part_that_cannot_be_is_refused(evaluate, part, message):
    result = evaluate("-t", "needle", "-M", "no-erase", "--part", part)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_part_starts_nothing_anew_since_the_others_are_in_the_same_folder(evaluate, tmp_path):
    result = evaluate("-t", "needle", "-M", "no-erase", "-o", str(tmp_path / "out"), "--part", "1/2", "--fresh")
    assert result.exit_code == 2
    assert "--fresh with --part 1/2" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_eval_adds_the_questions_of_a_file(evaluate, questions_file):
    result = evaluate("-t", "needle", "--data", str(questions_file), "-M", "no-erase", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["options"]["tasks"] == ["needle", "document-qa=questions.json"]
    assert str(questions_file.parent) not in json.dumps(data["options"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-t", "haystack"], "OptionError"),
        (["-M", "kveraser:size=3"], "OptionError"),
        (["--protocols", "never"], "OptionError"),
        (["--lengths", "99999"], "OptionError"),
        (["--data", "/no/such/file"], "OptionError"),
        (["-M", "no-erase", "-M", "no-erase"], "OptionError"),
    ],
)
def test_eval_names_what_is_wrong_with_its_options(evaluate, arguments, error):
    result = evaluate(*arguments, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == error
