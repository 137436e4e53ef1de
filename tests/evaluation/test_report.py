"""Tables and plots: the numbers of the records, and every file that is promised."""

from __future__ import annotations

import itertools
import json
import random
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import random_eraser, text_model
from kveraser.evaluation.plots import draw_plots
from kveraser.evaluation.provenance import commit, environment, eraser_facts, text_digest
from kveraser.evaluation.record import Record
from kveraser.evaluation.report import format_interval, provenance_line, results, write_report
from kveraser.evaluation.statistics import Interval
from kveraser.evaluation.summary import METRICS, OVERALL, Row, reference_method, summarise

METHODS = (
    "no-erase",
    "full-recompute",
    "delete-and-shift",
    "local-suffix-repair:tokens=8",
    "kveraser:repair=0",
    "kveraser",
)
DISTANCE = dict(zip(METHODS, (0.2, 0.0, 0.05, 0.02, 0.03, 0.01), strict=True))
HEADER = {
    "options": {"model": "tiny", "device": "cpu", "dtype": "float32", "limit": 4, "seed": 0},
    "environment": {"kveraser": "1", "commit": "abc", "torch": "2", "transformers": "5", "peft": "0", "threads": 1, "processor": "x"},
    "eraser": {"sha256": "0" * 64, "rank": 4, "window": None, "repair": 4},
}  # fmt: skip


def record(task, length, index, protocol, method, rng):
    gold = None if task == "injection" and index % 2 else "blue"
    return Record(
        task=task, length=length, index=index, protocol=protocol, method=method, used=method, tokens=length,
        tokens_erased=8, answer="blue", gold=gold, erased="red", exact_match=gold and True, f1=gold and 1.0, leaked=False,
        leak_margin=rng.gauss(0, 1), kl=DISTANCE[method] * rng.uniform(0.5, 1.5), agreement=0.9,
        tokens_recomputed=8, residual=rng.uniform(0, 1), milliseconds=rng.uniform(1, 100), recall="", recalled=False,
    )  # fmt: skip


def records(lengths=(256, 1024), count=4):
    rng = random.Random(0)
    cells = itertools.product(("needle", "injection"), lengths, range(count), ("query_after", "query_cached"), METHODS)
    return [record(*cell, rng) for cell in cells]


def one(rows, method, task=OVERALL, length=256, protocol="query_after"):
    (row,) = [r for r in rows if (r.task, r.length, r.protocol, r.method) == (task, length, protocol, method)]
    return row


def test_rows_hold_the_means_over_tasks_and_of_each_task():
    rows = summarise(records())
    assert len(rows) == 3 * 2 * 2 * len(METHODS)
    for method in METHODS:
        values = {
            task: [
                r.kl
                for r in records()
                if (r.task, r.length, r.protocol, r.method) == (task, 256, "query_after", method)
            ]
            for task in ("needle", "injection")
        }
        assert one(rows, method, "needle").values["kl"].mean == pytest.approx(np.mean(values["needle"]))
        assert one(rows, method).values["kl"].mean == pytest.approx(np.mean([np.mean(v) for v in values.values()]))
        assert one(rows, method).examples == 8


def test_metrics_are_over_the_examples_for_which_they_have_a_meaning():
    without = [r for r in records() if r.task == "injection" and r.gold is None]
    rows = summarise(without)
    assert one(rows, "kveraser").values["exact_match"] is None
    assert one(rows, "kveraser").values["leaked"].mean == 0
    some = one(summarise(records()), "kveraser")
    assert some.values["exact_match"].mean == 1
    assert (some.examples, some.values["exact_match"].count, some.values["leaked"].count) == (8, 6, 8)


def test_a_metric_that_one_method_does_not_have_is_there_for_the_others():
    made = [replace(r, residual=None) if r.method in ("no-erase", "full-recompute") else r for r in records()]
    rows = summarise(made)
    assert one(rows, "no-erase").values["residual"] is None
    assert one(rows, "kveraser").values["residual"] == one(summarise(records()), "kveraser").values["residual"]
    (cut,) = [at for at, r in enumerate(made) if r.key == ("needle", 256, 0, "query_after", "kveraser")]
    made[cut] = replace(made[cut], residual=None)
    assert {one(summarise(made), name).values["residual"].count for name in METHODS[2:]} == {7}


def test_a_method_that_seldom_knows_a_metric_has_none_of_it_and_takes_no_examples_from_the_others():
    made = [replace(r, residual=None) if r.method == "delete-and-shift" and r.index else r for r in records()]
    rows = summarise(made)
    assert one(rows, "delete-and-shift").values["residual"] is None
    assert one(rows, "kveraser").values["residual"] == one(summarise(records()), "kveraser").values["residual"]


def test_a_share_of_none_or_all_answers_has_the_exact_bound():
    def share(metric, of, task):
        return one(summarise([r for r in records((256,), of) if r.task == task]), "kveraser", task).values[metric]

    assert share("leaked", 4, "needle") == Interval(0, 0, pytest.approx(1 - 0.025 ** (1 / 4)), 4)
    assert share("exact_match", 40, "needle") == Interval(1, pytest.approx(0.025 ** (1 / 40)), 1, 40)
    two_of_three = [r for r in records((256,), 4) if (r.task, r.index) != ("needle", 3)]
    both = one(summarise(two_of_three), "kveraser").values["leaked"]
    assert both == Interval(0, 0, pytest.approx(1 - 0.025 ** (1 / 6)), 7)  # tasks count the same: as if each had three
    certain = [replace(r, agreement=1.0) for r in records((256,))]
    assert one(summarise(certain), "kveraser").values["agreement"] == Interval(1, 1, 1, 8)  # no share of answers


def test_kveraser_is_compared_with_every_other_approximate_method():
    rows = summarise(records())
    compared = {method: one(rows, method).values["kl_difference"] for method in METHODS}
    assert [method for method, value in compared.items() if value is None] == ["no-erase", "full-recompute", "kveraser"]
    shift = compared["delete-and-shift"]
    own, other = one(rows, "kveraser").values["kl"].mean, one(rows, "delete-and-shift").values["kl"].mean
    assert shift.mean == pytest.approx(own - other)
    assert shift.high < 0
    assert one(rows, "kveraser").values["kl_ratio"].mean == pytest.approx(own / other)
    assert one(rows, "delete-and-shift").values["kl_ratio"] == Interval(1, 1, 1, 8)


def test_methods_are_compared_with_kveraser_at_their_own_number_of_tokens_else_with_its_best():
    assert reference_method(METHODS) == "kveraser"
    variants = ["no-erase", "kveraser:repair=4", "kveraser:repair=8"]
    assert reference_method(variants) == reference_method(variants, "delete-and-shift") == "kveraser:repair=8"
    assert reference_method(variants, "local-suffix-repair:tokens=4") == "kveraser:repair=4"
    assert reference_method(variants, "local-suffix-repair:tokens=5") == "kveraser:repair=8"
    assert reference_method(["no-erase"]) is None


def test_a_ratio_to_nothing_is_left_out():
    zero = [Record(**{**r.__dict__, "kl": 0.0}) for r in records()]
    assert one(summarise(zero), "kveraser").values["kl_ratio"] is None


def test_an_example_counts_once_every_method_has_been_through():
    rows = summarise(records()[:-3])
    assert one(rows, "kveraser", length=1024, protocol="query_cached").examples == 7
    assert one(rows, "no-erase", length=1024, protocol="query_cached").examples == 7
    assert summarise(records()[: len(METHODS) - 1]) != []
    assert summarise([]) == []


def test_the_same_records_give_the_same_rows_and_rows_survive_json():
    rows = summarise(records(), seed=3)
    assert summarise(records(), seed=3) == rows
    assert [Row.from_dict(json.loads(json.dumps(row.as_dict()))) for row in rows] == rows


def test_numbers_are_shown_with_an_interval_where_it_shows():
    assert format_interval(Interval(0.5, 0.25, 0.75), 2) == "0.50 [0.25, 0.75]"
    assert format_interval(Interval(-0.001, -0.002, 0.001), 2) == "0.00"
    assert format_interval(None, 2) == ""


def tables_of(markdown):
    """Every table of a page, as lists of rows."""
    runs = itertools.groupby(markdown.splitlines(), lambda line: line.startswith("|"))
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in run] for is_table, run in runs if is_table
    ]


def test_every_file_is_written_and_the_tables_can_be_read(tmp_path):
    write_report(tmp_path, HEADER, records(), complete=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "kl_by_length.png", "kl_by_task.png", "kl_by_tokens.png", "quality_cost.png", "residual.png",
        "results.json", "results.md",
    ]  # fmt: skip
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["complete"]
    assert document["options"] == HEADER["options"]
    page = (tmp_path / "results.md").read_text()
    tables = tables_of(page)
    assert len(tables) == 3 * 2 * 2
    for table in tables:
        assert {len(row) for row in table} == {1 + len(METRICS)}
        assert [row[0].strip("`") for row in table[2:]] == list(METHODS)
    rows = [Row.from_dict(row) for row in document["rows"]]
    assert tables[0][2][1].startswith(f"{one(rows, 'no-erase').values['kl'].mean:.4f} [")
    for name in ("kl_by_length.png", "kl_by_tokens.png", "quality_cost.png", "kl_by_task.png", "residual.png"):
        assert f"({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_tables_say_how_many_examples_a_column_is_over_where_it_is_not_all(tmp_path):
    results_in(tmp_path / "tasks", records((256,)))
    write_report(tmp_path / "report", HEADER, records((256,)), complete=True)
    full, means = (
        FILL["fill"](f"<!-- results tasks {name} -->\n<!-- /results -->", tmp_path) for name in ("full", "means")
    )
    for page in (full, means, (tmp_path / "report" / "results.md").read_text()):
        assert "\n\nEM, F1: over 6 of the 8 examples.\n" in page
    assert "over 6" not in FILL["fill"]("<!-- results tasks tasks -->\n<!-- /results -->", tmp_path)


def test_the_table_of_answers_says_how_many_have_a_gold_one(tmp_path):
    results_in(tmp_path / "tasks", records((256,)))
    mark = "<!-- results tasks answers -->\n<!-- /results -->"
    (table,) = tables_of(FILL["fill"](mark, tmp_path))
    assert table[0][1:] == ["EM at 256", "leak at 256"]
    assert table[-1] == ["examples", "6", "8"]
    file = tmp_path / "tasks" / "results.json"
    older = json.loads(file.read_text(), object_hook=lambda found: {k: v for k, v in found.items() if k != "count"})
    file.write_text(json.dumps(older))  # of a version that did not count them
    (table,) = tables_of(FILL["fill"](mark, tmp_path))
    assert table[-1] == ["examples", "those of 8 with a gold answer", "8"]


def test_the_provenance_says_how_many_examples_an_unfinished_run_has_and_every_commit_that_made_it():
    finished, _ = results(HEADER, records(), True)
    assert "; 4 examples per task and length, seed 0; kveraser 1 at abc, torch" in provenance_line(finished)
    begun, _ = results(HEADER, records((256, 1024), 3), False)
    assert "; 4 examples per task and length wanted, 12 in all there (not finished), seed 0;" in provenance_line(begun)
    assert "0 in all there (not finished)" in provenance_line(results(HEADER, [], False)[0])
    two = [replace(r, commit="abc" if r.index else "def") for r in records()]
    assert " at def and abc, torch" in provenance_line(results(HEADER, two, True)[0])


def test_an_unfinished_run_says_so_and_an_empty_one_has_no_tables(tmp_path):
    write_report(tmp_path, HEADER, records()[:40], complete=False)
    assert "not finished" in (tmp_path / "results.md").read_text()
    write_report(tmp_path / "empty", {**HEADER, "eraser": None}, [], complete=False)
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == ["results.json", "results.md"]
    assert tables_of((tmp_path / "empty" / "results.md").read_text()) == []


def test_plots_are_drawn_for_one_length_one_task_and_many_methods_too():
    few = [r for r in records((256,), 1) if r.task == "needle" and r.protocol == "query_cached"]
    rng = random.Random(1)
    more = []
    for tokens in range(1, 8):
        name = f"local-suffix-repair:tokens={tokens}"
        DISTANCE[name] = 0.01
        more.append(record("needle", 256, 0, "query_cached", name, rng))
    plots = set(draw_plots(summarise(few + more)))
    assert plots == {"kl_by_length.png", "kl_by_tokens.png", "quality_cost.png", "kl_by_task.png"}
    assert set(draw_plots(summarise(few), few)) == {*plots, "residual.png"}


def test_the_provenance_names_versions_and_tells_erasers_apart():
    model = text_model()
    assert {"kveraser", "torch", "transformers", "peft", "threads", "commit"} <= environment(model).keys()
    assert commit() is None or len(commit().removesuffix("-dirty")) == 40
    facts = eraser_facts(random_eraser(model, window=(2, 8)))
    assert facts["window"] == (2, 8)
    assert facts["sha256"] == eraser_facts(random_eraser(model))["sha256"]
    assert facts["sha256"] != eraser_facts(random_eraser(model, scale=0.3))["sha256"]
    assert eraser_facts(None) is None
    assert text_digest(["a", "b"]) != text_digest(["ab"])


FILL = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "fill_results.py"))


@pytest.mark.parametrize("name", ["means", "means 256", "tasks 1024", "lengths", "full"])
def test_the_tables_of_pages_are_filled_from_results(tmp_path, name):
    (tmp_path / "tasks").mkdir()
    document, _ = results(HEADER, records(), True)
    (tmp_path / "tasks" / "results.json").write_text(json.dumps(document))
    page = f"Before.\n\n<!-- results tasks {name} -->\nold\n<!-- /results -->\n\nAfter.\n"
    filled = FILL["fill"](page, tmp_path)
    assert filled.startswith("Before.\n\n<!-- results tasks")
    assert filled.endswith("<!-- /results -->\n\nAfter.\n")
    assert "old" not in filled
    for table in tables_of(filled):
        assert len({len(row) for row in table}) == 1
        assert [row[0].strip("`") for row in table[2:]] == list(METHODS)
    assert FILL["fill"](filled, tmp_path) == filled


def test_what_was_not_made_again_is_marked_and_what_is_missing_too(tmp_path):
    (tmp_path / "documents").mkdir()
    document, _ = results(HEADER, records(), True)
    (tmp_path / "documents" / "results.json").write_text(json.dumps(document))
    page = "<!-- results documents made -->\n<!-- /results -->\n<!-- results other means -->\nold\n<!-- /results -->\n"
    assert "Not made again" in FILL["fill"](page, tmp_path, ["documents"])
    assert "Not made again" not in FILL["fill"](page, tmp_path)
    assert "Not made yet" in FILL["fill"](page, tmp_path)


def test_the_latency_of_the_demo_is_a_table(tmp_path):
    (tmp_path / "demo").mkdir()
    rows = [{"method": "kveraser", "suffix": n, "milliseconds": n / 10} for n in (100, 200)]
    (tmp_path / "demo" / "results.json").write_text(json.dumps({"latency": rows}))
    filled = FILL["fill"]("<!-- results demo latency -->\n<!-- /results -->", tmp_path)
    assert "| `kveraser` | 10 | 20 | 2.0x |" in filled


@pytest.mark.parametrize("mark", ["tasks nothing", "tasks means 77"])
def test_marks_that_cannot_be_filled_are_refused(tmp_path, mark):
    (tmp_path / "tasks").mkdir()
    document, _ = results(HEADER, records(), True)
    (tmp_path / "tasks" / "results.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="no table 'nothing'|at 77 tokens"):
        FILL["fill"](f"<!-- results {mark} -->\n<!-- /results -->", tmp_path)


PAGES = (
    "README.md",
    "docs/results.md",
    "docs/method.md",
    "src/kveraser/eraser/shipped/smollm2-135m-instruct/README.md",
)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_every_number_that_a_page_shows_is_that_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = FILL["MARKED"].findall(text)
    assert {name for _, _, name, _, _ in marks} <= set(FILL["TABLES"])
    assert FILL["fill"](text, ROOT / "docs" / "results") == text.replace(f"\n\n{FILL['KEPT']}", "")


def test_numbers_stand_within_sentences(tmp_path):
    (tmp_path / "tasks").mkdir()
    document, _ = results(HEADER, records(), True)
    (tmp_path / "tasks" / "results.json").write_text(json.dumps(document))
    filled = FILL["fill"](
        "It leaves <!-- results tasks kl kveraser -->old<!-- /results --> on <!-- results tasks count --><!-- /results -->.",
        tmp_path,
    )
    shown = re.sub("<!--.*?-->", "", filled)
    assert re.fullmatch(r"It leaves 0\.\d{4} / 0\.\d{4} on 8\.", shown)


def test_every_backbone_has_its_columns_in_the_overview(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        document, _ = results({**HEADER, "options": {**HEADER["options"], "model": folder}}, records((256,)), True)
        (tmp_path / folder / "results.json").write_text(json.dumps(document))
    (table,) = tables_of(FILL["fill"]("<!-- results one+two+three overview -->\n<!-- /results -->", tmp_path))
    assert table[0] == ["KL after / cached", "one", "two"]
    names = [row[0].strip("`") for row in table[2:]]
    assert names[-2:] == ["kveraser, nothing recomputed", "kveraser"]
    assert "local-suffix-repair" in names
    assert all(row[1] == row[2] for row in table[2:])


def results_in(folder, made, complete=True, **header):
    folder.mkdir()
    document, _ = results({**HEADER, **header}, made, complete)
    (folder / "results.json").write_text(json.dumps(document))


def test_every_run_has_its_rows_in_one_table(tmp_path):
    both = records((1024, 256))
    for folder, model, kind in (("b", "x", "neutral"), ("a", "y", "trained")):
        results_in(
            tmp_path / folder, both, options={**HEADER["options"], "model": model, "chat": True}, eraser={"kind": kind}
        )
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text(json.dumps({"latency": []}))
    (table,) = tables_of(FILL["fill"]("<!-- results * runs -->\n<!-- /results -->", tmp_path))
    assert [(row[1], row[4]) for row in table[2:]] == [("x", "256"), ("x", "1024"), ("y", "256"), ("y", "1024")]
    assert [row[0] for row in table[2:4]] == ["[b](results/b/results.md)"] * 2
    assert [row[3] for row in table[3:5]] == ["2 tasks, chat", "2 tasks, chat, trained eraser"]
    assert table[0][-1] == "kveraser"


def test_of_a_method_with_several_budgets_the_table_of_all_runs_has_that_of_the_reference(tmp_path):
    def with_budgets(*labels):
        as_is = {label.partition(":")[0]: label for label in METHODS if label != "kveraser:repair=0"}
        few = records((256,), 2)
        return [
            replace(r, method=label, kl=float(place))
            for place, label in enumerate(labels)
            for r in few
            if r.method == as_is[label.partition(":")[0]]
        ]

    results_in(tmp_path / "claimed", with_budgets("no-erase", "kveraser:repair=128", "kveraser"))
    results_in(
        tmp_path / "curve",
        with_budgets(
            "local-suffix-repair:tokens=8", "local-suffix-repair:tokens=16", "kveraser:repair=8", "kveraser:repair=16"
        ),
    )
    (table,) = tables_of(FILL["fill"]("<!-- results * runs -->\n<!-- /results -->", tmp_path))
    claimed, curve = (dict(zip(table[0], row, strict=True)) for row in table[2:])
    assert claimed["kveraser"] == "2.0000 / 2.0000"
    assert curve["local-suffix-repair"] == "1.0000 / 1.0000"
    assert curve["kveraser"] == "3.0000 / 3.0000"


@pytest.mark.parametrize("mark", ["kl kveraser:repair=128", "em kveraser", "same nothing"])
def test_a_number_that_a_run_does_not_have_is_refused_with_its_mark_and_folder(tmp_path, mark):
    results_in(tmp_path / "tasks", [replace(r, exact_match=None) for r in records((256,))], stories=[])
    results_in(tmp_path / "begun", [], complete=False, stories=[])
    for folder in ("tasks", "begun"):
        with pytest.raises(SystemExit, match=f"a page wants {mark} of {folder}"):
            FILL["fill"](f"It is <!-- results {folder} {mark} --><!-- /results -->.", tmp_path)
