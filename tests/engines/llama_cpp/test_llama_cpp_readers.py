"""Readers inside llama.cpp: its states as transformers has them, who has read a span, and recomputing them in runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kveraser as kv

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here; run: make test-llama-cpp")

from conftest import prefill
from kveraser.cache import Repair, Tokens, repair_slots
from kveraser.cache.surgery import cut
from kveraser.engines import llama_cpp as engine
from kveraser.engines.llama_cpp.cells import LIVE, WORK
from kveraser.engines.llama_cpp.listening import LlamaCppSource
from kveraser.engines.llama_cpp.packed import Packed
from kveraser.errors import CalibrationError, EngineError
from kveraser.readers import LEAST_READERS, ModelSource, calibrate, remember
from llama_cpp_helpers import failing_decode, ids_of, tiny_pair

FAMILIES = ("llama", "qwen2", "qwen3")
CACHES = {
    "f32": {"keys": "f32", "values": "f32", "flash_attention": False},
    "f16": {"keys": "f16", "values": "f16"},
    "q8_0": {"keys": "q8_0", "values": "q8_0"},
    "q4_0": {"keys": "q4_0", "values": "q4_0"},
}
ROUNDING = {"f32": 1e-4, "f16": 2e-3, "q8_0": 4e-2, "q4_0": 0.4}
IDS, SPAN, QUESTION = ids_of(400), kv.Span(150, 180), ids_of(6, seed=9)


class Both:
    """One model in transformers and in llama.cpp, which use the same probes."""

    def __init__(self, file, family):
        self.backbone = tiny_pair(file, family)
        self.model = engine.LlamaCppModel(file, threads=1)
        self.source = LlamaCppSource(self.model)
        found = calibrate(self.backbone, ids_of(500, seed=5))
        remember(self.backbone, found)
        remember(self.source, found)

    def context(self, cache="f32", ids=IDS, **options):
        options = {"length": 512, **CACHES[cache], **options}
        context = engine.LlamaCppContext(self.model, self.model.neutral_eraser(), **options)
        if ids:
            context.append(ids)
        return context

    def theirs(self):
        context = kv.ErasableContext(self.backbone, eraser=kv.KVEraser.neutral(self.backbone))
        context.append_ids(IDS)
        return context


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-cpp-readers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVERASER_CACHE", str(folder / "cache"))
        yield {family: Both(folder / f"{family}.gguf", family) for family in FAMILIES}


@pytest.fixture
def both(models):
    return models["llama"]


def away(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def bits(context):
    return context.backend.cells.read([kv.Span(0, context.backend.length)]).tobytes()


# -- what is looked at ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_read_out_of_cells_are_those_of_transformers(models, family, cache):
    both = models[family]
    wanted = prefill(both.backbone, torch.tensor([IDS])).layers
    found = both.context(cache).backend.source().layers
    assert len(found) == len(wanted)
    for index, layer in enumerate(wanted):
        assert away(found[index].keys, layer.keys) < ROUNDING[cache]
        assert away(found[index].values, layer.values) < ROUNDING[cache]


def test_slots_without_a_cell_read_as_zero(both):
    context = both.context()
    context.erase(SPAN, "kveraser:repair=0")
    layer = context.backend.source().layers[1]
    assert not layer.keys[:, :, SPAN.slice].any()
    assert layer.keys[:, :, SPAN.end].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_heard_as_transformers_computes_them(models, family):
    ids, ours, theirs = torch.tensor([IDS]), models[family].source, ModelSource(models[family].backbone)
    found, wanted = ours.observe(ids), theirs.observe(ids)
    assert found.unnormed.keys() == wanted.unnormed.keys()
    for index, layer in wanted.layers.items():
        assert away(found.layers[index].queries, layer.queries) < 2e-3
        assert found.layers[index].scaling == pytest.approx(layer.scaling)
    for index, queries in wanted.unnormed.items():
        assert away(found.unnormed[index].flatten(1), queries.flatten(1)) < 2e-3
        told = ours.norm(index)[0](wanted.unnormed[index])
        assert torch.allclose(told, theirs.norm(index)[0](wanted.unnormed[index]), atol=1e-5)


def test_tokens_that_are_gone_are_seen_by_nobody(both):
    gone = torch.zeros(len(IDS), dtype=torch.bool)
    gone[SPAN.slice] = True
    shorter = both.source.observe(torch.tensor([[*IDS[: SPAN.start], *IDS[SPAN.end :]]])).cache
    found = both.source.observe(torch.tensor([IDS]), gone).cache
    for ours, wanted in zip(found.layers, shorter.layers, strict=True):
        assert torch.equal(ours.values[:, :, ~gone], wanted.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibration_made_from_cells_explains_as_much(models, family):
    made = calibrate(models[family].source, ids_of(500, seed=5))
    wanted = calibrate(models[family].backbone, ids_of(500, seed=5))
    assert made.tells
    assert made.explained == pytest.approx(wanted.explained, abs=0.02)
    assert made.fingerprint.difference_to(wanted.fingerprint) is None


def test_a_first_erase_calibrates_on_the_engines_own_states_and_keeps_that(both, tmp_path, monkeypatch):
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path))
    model = engine.LlamaCppModel(both.model.file, threads=1)  # nothing is known of it yet
    context = engine.LlamaCppContext(model, length=512, **CACHES["f32"])
    context.append(IDS)
    receipt = context.erase(SPAN)
    assert receipt.residual is not None
    assert receipt.eraser == "neutral"
    assert len(list((tmp_path / "readers").iterdir())) == 1


# -- who has read a span -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_are_those_of_transformers(models, family):
    found, wanted = models[family].context().readers(SPAN), models[family].theirs().readers(SPAN)
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("span", "most"), [(SPAN, LEAST_READERS), (kv.Span(100, 160), 120)])
def test_the_chosen_runs_are_those_of_transformers_and_their_number_goes_by_the_length_of_the_span(
    models, family, span, most
):
    found = models[family].context().erase(span)
    wanted = models[family].theirs().erase(span, kv.Steering(block=16, keys=None))
    assert found.recomputed == wanted.recomputed
    assert found.residual == pytest.approx(wanted.residual, abs=1e-3)
    assert most - 22 <= found.tokens_recomputed <= most


@pytest.mark.parametrize("block", [4, 16, 32])
def test_runs_end_at_multiples_of_the_block_or_at_what_is_not_live(both, block):
    receipt = both.context().erase(SPAN, f"kveraser:block={block}")
    for run in receipt.recomputed:
        assert run.start % block == 0 or run.start == SPAN.end
        assert run.end % block == 0 or run.end == len(IDS)


def test_fewer_tokens_than_a_run_holds_are_one_shorter_run(both):
    receipt = both.context().erase(SPAN, "kveraser:repair=5")
    assert receipt.tokens_recomputed == 5 or receipt.recomputed[0].end % 5 == 0


# -- recomputing them ----------------------------------------------------------------------------------------------


def reference(both, runs, spans=(SPAN,)):
    """Log-probabilities in transformers when these runs are computed one after the other without the spans, the gap closed for a run
    right behind a span only."""
    ids = torch.tensor([IDS])
    cache, tokens = prefill(both.backbone, ids), Tokens(ids)
    live = torch.ones(len(IDS), dtype=torch.bool)
    for span in spans:
        live[span.slice] = False
    for run in runs:
        absent = tuple(span for span in spans if span.end == run.start)
        sees = live[: run.end].nonzero()[:, 0]
        repair_slots(both.backbone, cache, tokens, [Repair(torch.arange(run.start, run.end), sees, absent)])
    cut(cache, spans)
    places = torch.arange(len(IDS), len(IDS) + len(QUESTION))[None]
    with torch.no_grad():
        output = both.backbone(input_ids=torch.tensor([QUESTION]), position_ids=places, past_key_values=cache)
    return output.logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("method", ["kveraser", "kveraser:choose=next,repair=32", "kveraser:repair=0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_same_runs_in_transformers(models, family, method):
    context = models[family].context()
    receipt = context.erase(SPAN, method)
    found = context.logits_ids(QUESTION).log_softmax(-1)
    assert (found - reference(models[family], receipt.recomputed)).abs().max() < 2e-3


def test_several_spans_in_one_erase_are_those_of_transformers(both):
    spans = (SPAN, kv.Span(220, 233))
    context = both.context()
    receipt = context.erase(spans, "kveraser:repair=32")
    found = context.logits_ids(QUESTION).log_softmax(-1)
    assert (found - reference(both, receipt.recomputed, spans)).abs().max() < 2e-3


@pytest.mark.parametrize("cache", CACHES)
def test_an_erase_writes_the_chosen_runs_and_no_other_bit(both, cache):
    context = both.context(cache)
    before = [context.backend.cells.read([kv.Span(slot, slot + 1)]).tobytes() for slot in range(len(IDS))]
    receipt = context.erase(SPAN)
    written = {slot for run in (*receipt.spans, *receipt.recomputed) for slot in run}
    after = [context.backend.cells.read([kv.Span(slot, slot + 1)]).tobytes() for slot in range(len(IDS))]
    assert {slot for slot in range(len(IDS)) if before[slot] != after[slot]} == written
    assert receipt.positions_kept
    assert receipt.bytes_written == receipt.tokens_recomputed * context.backend.bytes_per_slot


@pytest.mark.parametrize("cache", CACHES)
def test_moved_cells_are_read_as_keys_turned_by_so_much(both, cache):
    context = both.context(cache)
    states = context.backend.cells.read([kv.Span(10, 30)])
    before, packed = Packed(states.copy(), both.model.anatomy), Packed(states, both.model.anatomy)
    packed.turn(7)
    assert packed.positions.tolist() == [position + 7 for position in before.positions]
    for layer in range(3):
        turned = both.source.turning.at(torch.tensor([7])).to_place(before.keys(layer).transpose(0, 1), layer)
        assert away(packed.keys(layer).transpose(0, 1), turned) < (ROUNDING[cache] if cache != "q4_0" else 0.15)
        assert torch.equal(packed.values(layer), before.values(layer))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", ["kveraser", "kveraser:choose=next,repair=32", "attention-guided-repair"])
def test_restore_is_bit_exact(both, cache, method):
    context = both.context(cache)
    before, logits = bits(context), context.logits_ids(QUESTION)
    receipt = context.erase(SPAN, method)
    assert not torch.equal(context.logits_ids(QUESTION), logits)
    assert context.restore(receipt).bit_exact
    assert method == "attention-guided-repair" or bits(context) == before
    assert torch.equal(context.logits_ids(QUESTION), logits)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_run_leaves_cells_and_ledger_as_they_were(both, error, at):
    context = both.context()
    before, logits = bits(context), context.logits_ids(QUESTION)
    with failing_decode(context, at, error), pytest.raises(error):
        context.erase(SPAN, "kveraser:block=4")
    assert bits(context) == before
    assert (context.erased, context.exact) == ((), True)
    assert torch.equal(context.logits_ids(QUESTION), logits)


# -- on the live context -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_erased_repaired_purged_saved_and_restored(both, tmp_path, cache):
    context = both.context(cache)
    context.erase(SPAN)
    second = context.erase([kv.Span(180, 190), kv.Span(250, 260)])  # right behind a hidden one
    context.append(ids_of(12, seed=4))
    context.save(tmp_path)
    loaded = engine.LlamaCppContext.load(tmp_path, both.model, both.model.neutral_eraser())
    assert (loaded.live_ids, loaded.erased, loaded.exact) == (context.live_ids, context.erased, context.exact)
    assert torch.allclose(loaded.logits_ids(QUESTION), context.logits_ids(QUESTION), atol=3e-2)
    loaded.restore(second)
    assert loaded.erased == (SPAN,)
    while not context.repair(chunk=100, max_chunks=1).finished:
        assert context.generate_ids(QUESTION, max_new_tokens=2)
    assert context.exact
    fresh = both.context(cache, context.live_ids)
    assert torch.allclose(context.logits_ids(QUESTION), fresh.logits_ids(QUESTION), atol=ROUNDING[cache] * 10)
    context.purge(context.erase(kv.Span(10, 20)))
    assert context.exact


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 20)),
    st.tuples(
        st.sampled_from(["kveraser:repair=8", "kveraser:repair=0", "kveraser:choose=next,repair=8", "local-suffix-repair"]),
        st.integers(0, 10**6),
    ),
    st.tuples(st.just("restore"), st.integers(0, 10**6)),
    st.tuples(st.just("look"), st.just(0)),
)  # fmt: skip


@settings(max_examples=25)
@given(st.lists(OPERATION, max_size=9))
def test_any_sequence_of_edits_keeps_ledger_and_cells_in_step(both, operations):
    context = both.context(ids=ids_of(40))
    gone: dict[str, kv.EraseReceipt] = {}
    for number, (name, value) in enumerate(operations):
        if name == "append":
            context.append(ids_of(value, seed=number + 1))
        elif name == "restore" and gone:
            context.restore(gone.pop(sorted(gone)[value % len(gone)]))
        elif name == "look" and context.live_ids:
            before = bits(context)
            context.generate_ids(max_new_tokens=2)
            context.logits_ids([], from_last=True)
            assert bits(context) == before
        elif name.startswith(("kveraser", "local")) and (runs := context.live_spans):
            run = runs[value % len(runs)]
            start = run.start + value % len(run)
            receipt = context.erase(kv.Span(start, min(start + 1 + value % 7, run.end)), name)
            gone[receipt.id] = receipt
        assert context.backend.cells.end(LIVE) == context.backend.length
        assert context.backend.cells.end(WORK) == 0
        hidden = sum(map(len, context.backend.marks.steered_spans))
        assert context.backend.length == len(context.live_ids) + hidden
        cells = Packed(context.backend.cells.read([kv.Span(0, 512)]), both.model.anatomy)
        assert len(cells) == len(context.live_ids)
    if context.live_ids and context.exact:
        fresh = both.context(ids=context.live_ids)
        assert torch.allclose(context.logits_ids(QUESTION), fresh.logits_ids(QUESTION), atol=2e-3)


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_where_readers_cannot_be_told_the_next_tokens_are_recomputed_and_the_receipt_says_so(both):
    model = engine.LlamaCppModel(both.model.file, threads=1)
    context = engine.LlamaCppContext(model, model.neutral_eraser(), length=512)
    context.tokenizer = None  # so that there is no text to calibrate on but its own
    context.append(IDS[:200])
    receipt = context.erase(kv.Span(50, 60), "kveraser:repair=32")
    assert receipt.recomputed == (kv.Span(60, 92),)
    assert "could not be told" in receipt.notes[0]


@pytest.mark.parametrize(
    ("key", "value", "words"), [("rope.scaling.type", "yarn", "yarn"), ("rope.dimension_count", 32, "rotated")]
)
def test_keys_rotated_in_an_unknown_way_are_not_read(both, key, value, words):
    anatomy = engine.LlamaCppModel(both.model.file, threads=1).anatomy
    anatomy._weights.metadata[f"llama.{key}"] = value
    with pytest.raises(CalibrationError, match=words):
        _ = anatomy.turning


def test_an_unknown_architecture_is_not_read(both):
    anatomy = engine.LlamaCppModel(both.model.file, threads=1).anatomy
    anatomy._weights.metadata["general.architecture"] = "mystery"
    with pytest.raises(CalibrationError, match="mystery"):
        _ = anatomy.fingerprint


def test_another_format_of_cells_is_not_read(both):
    states = both.context().backend.cells.read([kv.Span(0, 10)])
    with pytest.raises(EngineError, match="format"):
        Packed(states[:-4].copy(), both.model.anatomy)
    states[8] = 2
    with pytest.raises(EngineError, match="format"):
        Packed(states, both.model.anatomy)


def test_a_neutral_eraser_recomputes_a_number_of_tokens(both):
    with pytest.raises(kv.OptionError, match="repair"):
        both.model.neutral_eraser(-1)
