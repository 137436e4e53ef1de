"""The benchmarks' own parts that can be wrong without being slow."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from serving_helpers import services, tiny_service, tool_tokenizer

import kveraser as kv
from conftest import make_tokenizer, text_model, token_ids
from kveraser.evaluation.metrics import kl_divergence
from kveraser.readers import calibrate
from kveraser.tasks import EraseExample, Filler
from kveraser.training.lessons import encoder, join_examples

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_every_ablation_has_a_configuration_and_differs_from_the_control():
    ablations = load("ablations")
    control = ablations.configuration(ablations.ABLATIONS["control"], 5, None)
    for name, ablation in ablations.ABLATIONS.items():
        config = ablations.configuration(ablation, 5, None)
        plain = (config, ablation.variant, ablation.from_start) == (control, ablations.Variant(), True)
        assert plain == (name == "control"), name


def test_ablations_start_where_their_rows_say_and_share_their_lessons(monkeypatch, tmp_path):
    ablations, started = load("ablations"), []
    model, tokenizer = text_model(), make_tokenizer()
    monkeypatch.setattr(ablations.kv, "load_backbone", lambda name, dtype=None: (model, tokenizer))
    really = ablations.StageRun

    def watched(model, tokenizer, config, name, eraser, folder, **options):
        started.append(any(up.any() for name, up in eraser.named_parameters() if "k_proj.lora_B" in name))
        return really(model, tokenizer, config, name, eraser, folder, **options)

    monkeypatch.setattr(ablations, "StageRun", watched)
    small = [
        f"finetune.{change}" for change in ("contexts=1", "tokens=[48,96]", "validation_contexts=1", "tasks=[needle]")
    ]
    names = ["control", "learned-values"]
    ablations.main(names, tmp_path / "runs", 1, common=small, store=tmp_path / "store")
    assert started == [False, True, False]  # the last one only draws the contexts that all are judged on
    kept = json.loads((tmp_path / "runs" / "ablations.json").read_text())
    assert list(kept["runs"]) == names
    assert (tmp_path / "store" / "finetune").is_dir()
    ablations.main(names, tmp_path / "runs", 1, common=small)
    assert len(started) == 3
    with pytest.raises(SystemExit, match="other settings.*another --output"):
        ablations.main(names, tmp_path / "runs", 2, common=small)


@pytest.mark.parametrize("together", [False, True])
def test_both_training_loops_are_timed_on_the_same_examples(together):
    throughput = load("training_throughput")
    examples = [
        EraseExample("the code ", "is 1. ", "the car is blue ", "which code?", None, "1"),
        EraseExample("the door ", "is 2. ", "the code ", "which door?", "3", "2"),
    ]

    def encode(text):
        return make_tokenizer().encode(text, add_special_tokens=False)

    weights = {"query_after": 1.0, "query_cached": 1.0}
    lesson = join_examples(random.Random(0), examples, encode, weights, together=together)
    alone = throughput.one_by_one(lesson)
    assert len(alone) == len(lesson.probes) == 4
    for one, probe in zip(alone, lesson.probes, strict=True):
        (only,) = one.probes
        assert (only.ids, only.targets, only.kind) == (probe.ids, probe.targets, probe.kind)
        if probe.cached is not None:
            assert one.questions[only.cached] == lesson.questions[probe.cached]


@pytest.fixture
def serving_benchmarks(monkeypatch):
    """Loads benchmarks of the server, which share parts."""
    for name in ("measuring", "serving"):
        monkeypatch.setitem(sys.modules, name, load(name))
    return load


def test_an_agents_loop_is_replayed_in_both_apis_under_every_policy(serving_benchmarks):
    bench = serving_benchmarks("agent_loop")
    service = tiny_service(tool_tokenizer(), cache_budget=1 << 24)
    try:
        rows = bench.measure(service, "tiny", bench.Transcript(4, 12), ["openai", "anthropic"], 1, 2)
    finally:
        service.close()
    assert [(row["api"], row["policy"]) for row in rows] == [(a, p) for a in bench.APIS for p in bench.POLICIES]
    for row in rows:
        assert row["calls"] == 4
        assert 0 < row["tokens_processed"] < row["prompt_tokens"]
        assert (row["exact_replies"] == 4) == (row["policy"] == "exact")
    assert all(row["same_calls"] == row["times_fewer"] == 1 for row in rows if row["policy"] == "exact")
    assert all(row["times_fewer"] > 1 for row in rows if row["policy"] != "exact")


def test_many_clients_and_a_line_that_changes_are_timed(serving_benchmarks):
    serving = serving_benchmarks("serving")
    with services() as make:
        (conversation,) = serving.a_minute_later(make(), 900, 1, 2)
        dropped = serving.dropped_rows(serving.a_message_dropped(make(), 900, 100))
    assert 0 <= conversation["reused"] < 1
    afresh, changed = serving.changed_rows([conversation])
    assert (afresh["conversations"], changed["share_reused"]) == (1, conversation["reused"])
    assert serving.changed_table([afresh, changed]).row_count == 2
    assert [row["how"] for row in dropped] == ["read afresh", "exact", "kveraser"]
    assert dropped[0]["share_reused"] == 0 < dropped[2]["share_reused"] < 1
    assert serving.dropped_table(dropped).row_count == 3
    rows = serving_benchmarks("throughput").measure(text_model(), make_tokenizer(), 2, 3, 1)
    assert [row["clients"] for row in rows] == [1, 2, 2]
    assert all(row["same_replies"] == row["same_start"] == 1 for row in rows)
    assert rows[0]["times_one_client"] == 1


def test_states_are_fitted_freely_from_exactly_what_an_erase_leaves(monkeypatch):
    monkeypatch.setitem(sys.modules, "measuring", load("measuring"))
    ceiling = load("ceiling")
    model, tokenizer = text_model(), make_tokenizer()
    filler = Filler([f"The house number {n} is blue and it is fast." for n in range(9)], lambda part: len(part) // 2)
    calibration = calibrate(model, token_ids(600)[0])
    eraser = kv.KVEraser.neutral(model)
    eraser.calibration = calibration
    plan = ceiling.Plan(("preference",), tokens=(64, 64), steps=2, rate=1e-4)
    arms = [("query_after", 0, "span"), *(("query_cached", 12, arm) for arm in ("readers", "both"))]
    rows = list(ceiling.measure(model, tokenizer, plan, [(0, *arm) for arm in arms], calibration, filler))
    assert [ceiling.key_of(row) for row in rows] == [(0, *arm) for arm in arms]
    _, lesson = ceiling.draw(plan, 0, filler, encoder(tokenizer))
    (erase,), (question,) = lesson.erases, lesson.questions
    for row in rows:
        cached = row["protocol"] == "query_cached"
        context = kv.ErasableContext(model, tokenizer, eraser)
        context.append([*lesson.ids, *(question[:-1] if cached else ())])
        ((_, probes),) = [moment for moment in erase.moments if (moment[0] is not None) == cached]

        def seen(method, context=context, probes=probes):
            receipt = context.erase(list(erase.spans), method)
            logits = [context.logits_ids(probe.ids)[-len(probe.targets) :] for probe in probes]
            context.restore(receipt)
            return logits

        pairs = zip(seen("full-recompute"), seen(kv.Steering(repair=row["repair"])), strict=True)
        own, text, *fit = (kl_divergence(exact, erased) for exact, erased in pairs)
        wanted = {"fit": torch.cat(fit).mean().item(), "question": own.mean().item(), "text": text.mean().item()}
        assert row["neutral"] == pytest.approx(wanted, abs=1e-5)
        assert row["readers"] == row["repair"]
        first, *_, last = row["looks"]
        assert last["fit"] <= first["fit"]
        assert row["fitted"]["fit"] <= row["neutral"]["fit"]
        if row["arm"] == "readers":
            assert first == pytest.approx({"step": 0, **wanted}, abs=1e-5)
    assert [entry["contexts"] for entry in ceiling.summary(rows)] == [1] * len(rows)


DOCS = FOLDER.parent / "docs"
BENCH = DOCS / "bench"
FILL = runpy.run_path(str(DOCS / "fill_bench.py"))
PAGES = re.search("^BENCH_PAGES = (.*)$", (FOLDER.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[
    1
].split()


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_a_page_is_that_of_the_benchmarks(name):
    page = (FOLDER.parent / name).read_text(encoding="utf-8")
    assert FILL["MARKED"].findall(page)
    assert FILL["fill"](page, BENCH) == page


MEASURED = re.compile(
    r"\bKL (?:of |below |within )?\d|(?<![\w.])\d+\.?\d*e-\d+"
    r"|(?<![\w.])\d[\d,.]*(?: ?%|x\b|-fold\b| (?:ms|s|times|nats|(?:CPU |milli)?seconds|minutes|hours|tokens/s|tokens (?:per|a) second)\b)"
)
ALLOWED = {
    "docs/serving.md": {
        "(at most 1e-5 of their size": "asserted in tests/context/test_together.py",
        "float32, 2e-2 in bfloat16": "asserted in tests/context/test_together.py",
        "where something was erased, 1e-4 in float32": "asserted in tests/context/test_together.py",
    },
    "docs/engines.md": {
        "within 1e-4 (f32), 2e-3 (f16), 4e-2 (q8_0)": "asserted in test_llama_cpp_readers.py",
        "with the same gaps, within 2e-3": "asserted in test_llama_cpp_readers.py",
        "residuals within 1e-3 (": "asserted in test_llama_cpp_readers.py",
        "log-probabilities within 2e-3 over": "asserted in test_llama_cpp_agreement.py",
        "with log-probabilities within 1e-3": "asserted in test_vllm_server.py",
        "residuals equal within 1e-3": "asserted in test_vllm_server.py",
    },
}
"""What may stand in a line with such a number, and why: bounds of tests, and limits."""


def by_hand(page, allowed=()):
    """Lines with a measured number that is in no code and between no marks. Numbers in words, and counts of things, are not found."""
    prose = FILL["MARKED"].sub("", page)
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`|\]\([^)\s]*\)", "", prose, flags=re.DOTALL | re.MULTILINE)
    for text in allowed:
        prose = prose.replace(re.sub(r"`[^`]*`", "", text), "")
    return [line for line in prose.splitlines() if MEASURED.search(line)]


@pytest.mark.parametrize("name", [*PAGES, "docs/security.md"])
def test_no_measured_number_of_a_page_is_written_by_hand(name):
    page, allowed = (FOLDER.parent / name).read_text(encoding="utf-8"), ALLOWED.get(name, {})
    assert [text for text in allowed if text not in page] == []
    assert by_hand(page, allowed) == []


@pytest.mark.parametrize(
    "line",
    [
        "It took 0.42 s.",
        "KL 0.0003 is left",
        "99.4 % stay",
        "| 144x |",
        "4.8 times as many",
        "off by 0.1 nats",
        "within 2.0e-5",
    ],
)
def test_a_number_written_by_hand_is_found_outside_of_code_and_marks(line):
    assert by_hand(f"Some text.\n{line}\n") == [line]
    assert by_hand(f"```\n{line}\n```\nof `{line}`: <!-- bench a b -->{line}<!-- /bench -->") == []


def test_what_contexts_gave_is_summed_up_by_length_protocol_and_method(serving_benchmarks, tmp_path):
    distances = serving_benchmarks("distances")
    says = {"same": True, "leak": False, "recomputed": 64}
    rows = [
        {"length": 100, "index": n, "protocol": protocol, "methods": {"some": {"kl": kl, "ms": 10 * n, **says}, "no-erase": {"kl": 1, "ms": 0}}}
        for n, kl in enumerate((0.1, 0.2, 0.6))
        for protocol in ("query_cached", "query_after")
    ]  # fmt: skip
    del rows[0]["methods"]["no-erase"]
    after, _, _, plain = found = distances.summary(rows)
    assert [(row["protocol"], row["method"], row["contexts"]) for row in found] == [
        ("after", "some", 3), ("after", "no-erase", 3), ("cached", "some", 3), ("cached", "no-erase", 2)
    ]  # fmt: skip
    assert after | {"kl": 0.3} == {"length": 100, "protocol": "after", "method": "some", "contexts": 3, "kl": 0.3, "median": 0.2,
                                   "same": 3, "leaks": 0, "ms": 10, "recomputed": 64}  # fmt: skip
    assert after["kl"] == pytest.approx(0.3)
    assert plain["same"] is plain["leaks"] is plain["recomputed"] is None
    distances.record("engine_quality_some", rows, {"model": "a", "threads": 1}, tmp_path)
    assert distances.earlier(tmp_path, "engine_quality_some") == rows
    kept = tmp_path / "engine_quality_some.json"
    kept.write_text(kept.read_text().replace(distances.CHOSEN, "some other way"))
    with pytest.raises(SystemExit, match="chosen otherwise .some other way.*another --output"):
        distances.earlier(tmp_path, "engine_quality_some")
    distances.main(tmp_path)
    filled = FILL["fill"]("<!-- bench engine_quality_some_summary -->\n<!-- /bench -->", tmp_path)
    assert "| `no-erase` | cached | 100 | 2 | 1.0000 | 1.0000 |  |  |" in filled
    assert "Made with: model a, threads 1." in filled


def test_summaries_are_those_of_the_contexts_on_record(serving_benchmarks):
    distances = serving_benchmarks("distances")
    summaries = [*BENCH.glob("*_quality_*_summary.json")]
    assert len(summaries) == len([*BENCH.glob("*_quality_*.json")]) - len(summaries) > 0
    for file in summaries:
        made, record = (
            json.loads(each.read_text()) for each in (file, file.with_name(file.name.replace("_summary", "")))
        )
        assert (made["rows"], made["environment"]) == (distances.summary(record["rows"]), record["environment"])


def test_a_number_that_no_single_row_has_is_refused(tmp_path):
    (tmp_path / "some.json").write_text('{"benchmark": "some", "rows": [{"a": 1, "b": 2.5}, {"a": 1, "b": 3}]}')
    filled = FILL["fill"]("It is <!-- bench some b:1 b=3 -->?<!-- /bench -->.", tmp_path)
    assert filled == "It is <!-- bench some b:1 b=3 -->3.0<!-- /bench -->."
    assert ">250.0%<" in FILL["fill"]("<!-- bench some b:1% b=2.5 -->?<!-- /bench -->", tmp_path)
    with pytest.raises(SystemExit, match="2 rows are so"):
        FILL["fill"]("<!-- bench some b a=1 -->?<!-- /bench -->", tmp_path)
