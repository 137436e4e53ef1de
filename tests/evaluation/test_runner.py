"""Runs over many examples: the same examples for all, resumable at any moment."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.evaluation import Erratum
from kveraser.evaluation.erratum import as_compared
from kveraser.evaluation.record import RECORDS, RESULTS, Part, Record, RecordLog
from kveraser.evaluation.report import results
from kveraser.evaluation.runner import EvalOptions, default_methods, draw, evaluate, task_label
from kveraser.evaluation.summary import summarise
from kveraser.methods import as_method
from kveraser.tasks import Filler

OPTIONS = EvalOptions(
    tasks=("needle", "tool-observation"),
    lengths=(90, 120),
    protocols=("query_after", "query_cached"),
    methods=tuple(map(as_method, ("no-erase", "full-recompute", "delete-and-shift", "kveraser"))),
    limit=2,
    max_new_tokens=4,
)
HEADER = {"options": OPTIONS.as_dict(), "environment": {}, "eraser": None}
TOTAL = 2 * 2 * 2 * 2 * 4


def examples(options=OPTIONS):
    passages = [
        f"The car number {n} is blue and fast. It has a door with a code. The code is {n * 37}." for n in range(30)
    ]
    return draw(options, Filler(passages, lambda text: len(text.split())))


def run(log, options=OPTIONS, keep=None):
    model = text_model()
    evaluate(
        model, make_tokenizer(), random_eraser(model), options, examples(options), keep or log.add, list(log.records)
    )
    return log.records


def timeless(records):
    return sorted((replace(record, milliseconds=0.0) for record in records), key=lambda record: record.key)


@pytest.fixture(scope="module")
def uninterrupted():
    return list(run(RecordLog(HEADER)))


def test_every_method_is_run_on_every_example_in_both_protocols(uninterrupted):
    assert len(uninterrupted) == len({record.key for record in uninterrupted}) == TOTAL
    for record in uninterrupted:
        assert (record.exact_match is None) == (record.f1 is None) == (record.gold is None)
        assert record.tokens > record.tokens_erased > 0
        if record.method == "full-recompute":
            assert record.kl == record.leak_margin == 0
    assert any(record.kl > 0 for record in uninterrupted)


def test_a_method_that_says_what_holds_instead_is_refused_before_anything_is_run_where_nothing_does():
    says = replace(OPTIONS, methods=(*OPTIONS.methods, as_compared("delete-and-erratum")))
    with pytest.raises(kv.OptionError, match="-t replaced"):
        examples(replace(says, tasks=("replaced", "needle")))
    assert examples(replace(says, tasks=("replaced",)))


def test_the_same_seed_draws_the_same_examples_and_tasks_come_in_turns():
    assert examples() == examples()
    assert examples() != examples(replace(OPTIONS, seed=1))
    assert [(d.task, d.length, d.index) for d in examples()][:5] == [
        ("needle", 90, 0),
        ("tool-observation", 90, 0),
        ("needle", 120, 0),
        ("tool-observation", 120, 0),
        ("needle", 90, 1),
    ]


@pytest.mark.parametrize("stop", [1, 7, 30])
def test_an_interrupted_run_goes_on_to_the_results_of_an_uninterrupted_one(tmp_path, uninterrupted, stop):
    log = RecordLog(HEADER, tmp_path)

    def keep(record):
        log.add(record)
        if len(log.records) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(log, keep=keep)
    again = RecordLog(HEADER, tmp_path)
    assert len(again.records) == stop
    run(again)
    assert len(again.records) == TOTAL
    assert timeless(again.records) == timeless(uninterrupted)
    assert timeless(RecordLog(HEADER, tmp_path).records) == timeless(uninterrupted)


def test_a_finished_run_runs_no_model_again(tmp_path, uninterrupted):
    log = RecordLog(HEADER, tmp_path)
    for record in uninterrupted:
        log.add(record)
    evaluate(
        text_model(), make_tokenizer(), None, OPTIONS, examples(), pytest.fail, RecordLog(HEADER, tmp_path).records
    )


def test_a_broken_last_line_is_dropped_and_made_again(tmp_path, uninterrupted):
    log = RecordLog(HEADER, tmp_path)
    for record in uninterrupted[:3]:
        log.add(record)
    file = tmp_path / RECORDS
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    again = RecordLog(HEADER, tmp_path)
    assert again.records == uninterrupted[:2]
    again.add(uninterrupted[2])
    assert file.read_bytes() == whole


def test_every_line_is_one_record(tmp_path, uninterrupted):
    log = RecordLog(HEADER, tmp_path)
    log.add(uninterrupted[0])
    (line,) = (tmp_path / RECORDS).read_text().splitlines()
    assert json.loads(line) == asdict(uninterrupted[0])
    there = json.loads((tmp_path / RESULTS).read_text())
    assert there["options"] == HEADER["options"]
    assert not there["complete"]


def test_a_run_with_other_options_is_refused_until_it_is_started_anew(tmp_path, uninterrupted):
    RecordLog(HEADER, tmp_path).add(uninterrupted[0])
    other = {**HEADER, "options": replace(OPTIONS, limit=3).as_dict()}
    with pytest.raises(kv.OptionError, match="limit is 3, was 2.*--fresh"):
        RecordLog(other, tmp_path)
    assert len(RecordLog(HEADER, tmp_path).records) == 1
    assert RecordLog(other, tmp_path, fresh=True).records == []
    assert json.loads((tmp_path / RESULTS).read_text())["options"]["limit"] == 3


def test_other_options_are_fine_where_nothing_was_recorded(tmp_path):
    RecordLog(HEADER, tmp_path)
    RecordLog({**HEADER, "options": {}}, tmp_path)


def test_a_run_whose_folder_another_one_took_before_its_first_record_keeps_none(tmp_path, uninterrupted):
    first, other = (
        RecordLog(HEADER, tmp_path, part=Part(1, 2)),
        {**HEADER, "options": replace(OPTIONS, limit=3).as_dict()},
    )
    second = RecordLog(other, tmp_path, part=Part(2, 2))
    second.add(uninterrupted[0])
    with pytest.raises(kv.OptionError, match="limit is 2, was 3"):
        first.add(uninterrupted[1])
    assert RecordLog(other, tmp_path).records == [uninterrupted[0]]


@contextmanager
def at_most(size):
    """Files cannot grow beyond so many bytes, as on a full disk: what fits is written, the rest is refused."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX's")
def test_a_record_that_does_not_fit_on_the_disk_is_taken_back_and_the_run_goes_on_later(tmp_path, uninterrupted):
    log = RecordLog(HEADER, tmp_path)
    log.add(uninterrupted[0])
    before = (tmp_path / RECORDS).read_bytes()
    with at_most(len(before) + 20), pytest.raises(kv.OptionError, match="make room, and the same command goes on"):
        log.add(uninterrupted[1])
    assert (tmp_path / RECORDS).read_bytes() == before
    assert log.records == [uninterrupted[0]]
    again = RecordLog(HEADER, tmp_path)
    again.add(uninterrupted[1])
    assert RecordLog(HEADER, tmp_path).records == uninterrupted[:2]


def test_other_files_with_examples_are_neither_read_nor_removed(tmp_path, uninterrupted):
    names = ("examples_of_my_own.jsonl", "examples.old.jsonl", "examples.1-of-2.jsonl.bak", "my-examples.jsonl")
    for name in names:
        (tmp_path / name).write_text("mine")
    RecordLog(HEADER, tmp_path).add(uninterrupted[0])
    assert RecordLog(HEADER, tmp_path).records == [uninterrupted[0]]
    RecordLog(HEADER, tmp_path, fresh=True)
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}


def test_results_without_the_examples_they_were_made_of_are_kept_until_the_run_is_started_anew(tmp_path):
    published = json.dumps({**HEADER, "complete": True, "rows": [{}]})
    (tmp_path / RESULTS).write_text(published)
    for part in (None, Part(1, 2)):
        with pytest.raises(kv.OptionError, match="has results but not the examples they were made of.*--fresh"):
            RecordLog(HEADER, tmp_path, part=part)
    assert (tmp_path / RESULTS).read_text() == published
    assert RecordLog(HEADER, tmp_path, fresh=True).records == []
    assert json.loads((tmp_path / RESULTS).read_text())["rows"] == []


def test_a_run_that_is_started_anew_has_no_record_of_the_old_one_or_of_its_parts(tmp_path, uninterrupted):
    for part in (None, Part(1, 2), Part(3, 3)):
        RecordLog(HEADER, tmp_path, part=part).add(uninterrupted[0])
    other = {**HEADER, "options": replace(OPTIONS, limit=3).as_dict()}
    assert RecordLog(other, tmp_path, fresh=True).records == []
    assert [file.name for file in tmp_path.iterdir()] == [RESULTS]


def test_every_commit_that_made_records_of_a_run_is_kept(tmp_path, uninterrupted):
    header = {**HEADER, "options": {**HEADER["options"], "seed": 0}}
    for commit, records in (("abc", uninterrupted[:8]), ("def", uninterrupted[8:])):
        log = RecordLog({**header, "environment": {"commit": commit}}, tmp_path)
        for record in records:
            log.add(record)
    again = RecordLog({**header, "environment": {"commit": "012"}}, tmp_path)
    for records, commits in ((again.records, ["abc", "def"]), (again.records[:8], ["abc"])):
        document, _ = results(again.header, records, True)
        assert document["environment"] == {"commit": "012", "commits": commits}
    document, _ = results(header | {"environment": {"commit": "abc"}}, again.records[:8], True)
    assert document["environment"] == {"commit": "abc"}


@pytest.mark.parametrize("damage", ["no json\n", '{"task": "needle"}\n', "[1]\n"])
def test_a_damaged_file_is_named_with_its_line(tmp_path, uninterrupted, damage):
    RecordLog(HEADER, tmp_path).add(uninterrupted[0])
    with (tmp_path / RECORDS).open("a") as file:
        file.write(damage)
    with pytest.raises(kv.OptionError, match="line 2 of .*--fresh"):
        RecordLog(HEADER, tmp_path)


def test_records_without_their_options_and_folders_that_are_files_are_refused(tmp_path, uninterrupted):
    RecordLog(HEADER, tmp_path / "a").add(uninterrupted[0])
    (tmp_path / "a" / RESULTS).write_text("{}")
    with pytest.raises(kv.OptionError, match="does not say with which options"):
        RecordLog(HEADER, tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(kv.OptionError, match="cannot write results"):
        RecordLog(HEADER, tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ("haystack",)}, "no task 'haystack'"),
        ({"tasks": ()}, "no tasks"),
        ({"protocols": ("before",)}, "no protocol 'before'"),
        ({"methods": (kv.NoErase(), kv.NoErase())}, "twice in methods: no-erase"),
        ({"lengths": (64, 64)}, "twice in lengths: 64"),
        ({"lengths": (0,)}, "at least 1"),
        ({"limit": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused(change, said):
    with pytest.raises(kv.OptionError, match=said):
        replace(OPTIONS, **change)


def test_contexts_that_the_model_cannot_read_are_refused():
    with pytest.raises(kv.OptionError, match="has 16384 positions"):
        evaluate(text_model(), make_tokenizer(), None, replace(OPTIONS, lengths=(20000,)), [], pytest.fail)


def test_every_method_is_compared_at_the_same_numbers_of_recomputed_tokens():
    chosen = default_methods((16, 64))
    registered = {name for name, kind in kv.methods().items() if kind.compared}
    assert {method.name for method in chosen} == {*registered, "erratum"}
    for kind in (kind for kind in kv.methods().values() if kind.compared):
        own = [method.recomputes for method in chosen if type(method) is kind]
        assert own == ([None] if kind.budget_option is None else [0, 16, 64] if kind is kv.Steering else [16, 64])
    assert all(method.with_budget(7).recomputes in (None, 7) for method in chosen)


def test_a_file_is_shown_without_its_folder():
    assert task_label("document-qa=/some/folder/questions.json") == "document-qa=questions.json"
    assert task_label("needle") == "needle"


def test_a_file_with_fewer_questions_than_the_limit_gives_what_it_has(questions_file):
    options = replace(OPTIONS, tasks=(f"document-qa={questions_file}",), lengths=(64,), limit=5)
    assert [(drawn.task, drawn.index) for drawn in examples(options)] == [
        ("document-qa=questions.json", 0),
        ("document-qa=questions.json", 1),
    ]


def test_in_chat_form_the_texts_are_the_templates_and_it_is_part_of_what_identifies_a_run(tmp_path, uninterrupted):
    chat = replace(OPTIONS, chat=True, lengths=(90,), limit=1)
    records = run(RecordLog(HEADER), chat)
    plain = [r for r in uninterrupted if (r.length, r.index) == (90, 0)]
    assert [r.key for r in records] == [r.key for r in plain]
    assert all(r.tokens > p.tokens for r, p in zip(records, plain, strict=True))
    assert "chat" not in OPTIONS.as_dict()  # so that runs from before there was a chat form go on
    RecordLog(HEADER, tmp_path).add(uninterrupted[0])
    with pytest.raises(kv.OptionError, match="chat is True, was None"):
        RecordLog({**HEADER, "options": replace(OPTIONS, chat=True).as_dict()}, tmp_path)


def test_a_chat_form_without_a_chat_template_is_refused_before_anything_is_run():
    bare = copy.deepcopy(make_tokenizer())
    bare.chat_template = None
    with pytest.raises(kv.OptionError, match="has no chat template"):
        evaluate(text_model(), bare, None, replace(OPTIONS, chat=True), examples(), pytest.fail)


@pytest.mark.parametrize("chat", [False, True])
def test_an_erratum_is_compared_by_its_line_and_everybody_is_asked_for_what_was_taken_back(chat):
    methods = (kv.NoErase(), Erratum(), kv.FullRecompute())
    records = run(RecordLog(HEADER), replace(OPTIONS, methods=methods, chat=chat, lengths=(90,), limit=1))
    assert len(records) == 2 * 2 * 3
    for record in records:
        assert record.recall is not None
        assert record.recalled is not None
        if record.method == "erratum":
            assert record.tokens_recomputed > record.tokens_erased  # the line says the span again
            assert record.kl > 0
            assert record.used == "erratum"
        elif record.method == "full-recompute":
            assert record.kl == record.leak_margin == 0
    rows = summarise(records)
    assert all(row.values["recalled"] is not None for row in rows)


def test_without_an_erratum_nobody_is_asked_for_what_was_taken_back(uninterrupted):
    assert {record.recalled for record in uninterrupted} == {None}


def test_records_of_a_version_that_did_not_ask_for_it_are_read(tmp_path, uninterrupted):
    RecordLog(HEADER, tmp_path)
    entry = asdict(uninterrupted[0])
    del entry["recall"], entry["recalled"]
    (tmp_path / RECORDS).write_text(json.dumps(entry) + "\n")
    assert RecordLog(HEADER, tmp_path).records == [uninterrupted[0]]


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        Record(**dict.fromkeys(Record.__dataclass_fields__)).kl = 1.0
