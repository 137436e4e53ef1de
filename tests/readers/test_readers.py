"""Who has read a span: masses, probes, calibration, files, choice."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, tiny, token_ids
from kveraser.cache import Tokens
from kveraser.readers import (
    ModelSource,
    Scene,
    Turning,
    cached_file,
    calibrate,
    choose,
    files,
    first_behind,
    read_calibration,
    residual,
    write_calibration,
)  # fmt: skip
from kveraser.readers.choice import carried_on
from kveraser.readers.known import calibration_for, known_calibration
from kveraser.readers.masses import Landscape, span_mass
from kveraser.readers.observing import observe


@given(st.integers(1, 150), st.integers(1, 30), st.integers(0, 9), st.integers(0, 3))
def test_masses_are_those_of_a_softmax_over_everything_while_the_samples_cover_it(before, size, seed, holes):
    generator = torch.Generator().manual_seed(seed)
    length = before + size + 150
    keys, queries = (torch.randn(heads, length, 8, generator=generator) for heads in (2, 4))
    live = torch.ones(length, dtype=torch.bool)
    live[before // 2 : before // 2 + holes] = False
    span = torch.arange(before + holes, before + holes + size)
    slots = torch.arange(before + holes + size, length)
    land = Landscape.of(live, span)
    land = replace(land, samples=_others(land))
    expected = (queries.view(2, 2, length, 8) @ keys[:, None].transpose(-1, -2)).view(4, length, length)[:, slots] * 0.5
    hidden = ~live[None] | (torch.arange(length) > slots[:, None])
    expected = expected.masked_fill(hidden, -torch.inf).softmax(-1)[..., span].sum(-1)
    for run in (True, False):
        mass, _ = span_mass(queries[:, slots], slots, keys, 0.5, land, run=run)
        assert torch.allclose(mass, expected, atol=1e-4)


def test_a_row_that_is_padded_behind_a_span_has_read_nothing_of_it():
    model, span = tiny("llama", 4), kv.Span(30, 40)
    calibration = calibrate(model, token_ids(600, seed=3)[0])
    rows = token_ids(120, rows=2)
    mask = torch.ones_like(rows)
    mask[1, :50] = 0
    tokens = Tokens(rows, (mask.cumsum(-1) - 1).clamp(min=0), mask)
    both = Scene.of(ModelSource(model, prefill(model, rows, mask=mask)), tokens, (span,), (), calibration)
    alone = Scene.of(ModelSource(model, prefill(model, rows[:1])), Tokens(rows[:1]), (span,), (), calibration)
    for found in (both.everywhere(), both.thin()):
        assert bool(found.isfinite().all())
        assert not found[1].any()
    assert torch.allclose(both.everywhere()[:1], alone.everywhere(), atol=1e-4)


def test_a_thin_look_behind_a_long_span_holds_no_more_scores_at_a_time_and_sees_the_same(monkeypatch):
    model, ids = tiny("llama", 4), token_ids(300)
    calibration = calibrate(model, token_ids(600, seed=3)[0])
    scene = Scene.of(ModelSource(model, prefill(model, ids)), Tokens(ids), (kv.Span(30, 90),), (), calibration)
    at_once, looked = scene.thin(), []
    module = sys.modules[Scene.__module__]

    def counted(queries, slots, *others, **options):
        looked.append(len(slots))
        return span_mass(queries, slots, *others, **options)

    monkeypatch.setattr(module, "MOST_SCORES", 1 << 12)
    monkeypatch.setattr(module, "span_mass", counted)
    assert torch.allclose(at_once, scene.thin(), atol=1e-6)
    heads = scene.calibration.scan.heads
    assert heads * max(looked) * len(scene.lands[0].span) <= 1 << 12
    assert sum(looked) == 270


def test_a_close_look_at_more_than_fits_into_memory_sees_what_it_would_see_at_once(monkeypatch):
    model, ids = tiny("llama", 4), token_ids(300)
    calibration = calibrate(model, token_ids(600, seed=3)[0])
    scene = Scene.of(ModelSource(model, prefill(model, ids)), Tokens(ids), (kv.Span(30, 90),), (), calibration)
    chosen = scene.suffix[::3]
    at_once = scene.close(scene.suffix), scene.needed(chosen, 40)
    monkeypatch.setattr(sys.modules[Scene.__module__], "MOST_SCORES", 1 << 16)
    assert len(scene._parts(scene.suffix)) > 10
    assert torch.allclose(at_once[0], scene.close(scene.suffix), atol=1e-6)
    assert torch.equal(at_once[1], scene.needed(chosen, 40))


def _others(land):
    rest = land.live.clone()
    rest[land.span] = False
    rest[land.sink] = False
    return rest.nonzero()[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_tell_the_queries_of_every_family(family):
    model = tiny(family, 4)
    calibration = calibrate(model, token_ids(1200)[0])
    assert calibration.explained > 0.8
    assert calibration.tells


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_told_readers_are_those_of_the_true_attention(family):
    model, ids, span = tiny(family, 4), token_ids(300), kv.Span(100, 130)
    calibration = calibrate(model, token_ids(1500, seed=3)[0])
    eraser = kv.KVEraser.neutral(model)
    eraser.calibration = calibration
    told = kv.readers(model, prefill(model, ids), ids, span, eraser=eraser)
    assert told.shape == (1, 170)
    assert told.dtype == torch.float32
    seen = observe(model, ids)
    land = Landscape.of(torch.ones(300, dtype=torch.bool), torch.arange(100, 130))
    slots = torch.arange(130, 300)
    true = torch.zeros(170)
    for probe in calibration.probes:
        layer = seen.layers[probe.layer]
        keys = seen.cache.layers[probe.layer].keys[0]
        true += span_mass(layer.queries[:, slots], slots, keys, layer.scaling, land, run=True)[0].amax(0)
    assert torch.corrcoef(torch.stack([told[0], true]))[0, 1] > 0.8


def test_readers_of_padded_rows_are_those_of_every_row_alone():
    model, span = tiny("llama", 4), kv.Span(100, 130)
    eraser = kv.KVEraser.neutral(model, ids=token_ids(600, seed=3)[0])
    rows = token_ids(200, rows=2)
    mask = torch.ones_like(rows)
    mask[1, :20] = 0
    both = kv.readers(model, prefill(model, rows, mask=mask), rows, span, mask, eraser=eraser)
    alone = kv.readers(model, prefill(model, rows[1:, 20:]), rows[1:, 20:], kv.Span(80, 110), eraser=eraser)
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_too_little_text_and_other_models_are_refused_by_name():
    model, ids = build(make_config("llama"), seed=7), token_ids(100)  # its own: others' may be calibrated by now
    with pytest.raises(kv.CalibrationError, match="100 tokens are too little"):
        calibrate(model, ids[0])
    with pytest.raises(kv.CalibrationError, match="too little"):
        kv.readers(model, prefill(model, ids), ids, kv.Span(5, 9))
    eraser = kv.KVEraser.neutral(model, ids=token_ids(300)[0])
    other = tiny("mistral")
    with pytest.raises(kv.EraserMismatchError, match="another model"):
        kv.erase(other, prefill(other, ids), ids, kv.Span(5, 9), eraser=eraser)
    stranger = kv.KVEraser.neutral(other)
    stranger.calibration = eraser.calibration
    with pytest.raises(kv.CalibrationError, match="another model"):
        kv.erase(other, prefill(other, ids), ids, kv.Span(5, 9), eraser=stranger)


def test_a_calibration_is_made_once_and_kept_and_a_damaged_one_is_made_again():
    model = build(make_config("llama", 4), seed=5)
    asked = []

    def text():
        asked.append(1)
        return token_ids(1100)[0]

    first = calibration_for(model, text)
    assert len(asked) == 1
    assert calibration_for(model, text) is first
    twin = build(make_config("llama", 4), seed=5)
    stored = known_calibration(twin)
    assert stored is not None
    assert torch.allclose(stored.scan.down, first.scan.down, atol=1e-2)
    file = cached_file(model)
    data = bytearray(file.read_bytes())
    data[-5] ^= 255
    file.write_bytes(bytes(data))
    with pytest.raises(kv.CalibrationError, match="checksum"):
        read_calibration(file)
    third = build(make_config("llama", 4), seed=5)
    assert known_calibration(third) is None
    calibration_for(third, text)
    assert len(asked) == 2


def test_a_calibration_from_little_text_is_not_kept():
    model = build(make_config("llama", 4), seed=6)
    assert calibration_for(model, lambda: token_ids(400)[0]).tells
    assert not calibration_for(model, lambda: token_ids(40)[0]).tells
    assert known_calibration(model) is None


def test_a_file_of_a_newer_format_or_none_at_all_is_refused(tmp_path, monkeypatch):
    calibration = calibrate(tiny(), token_ids(300)[0])
    with pytest.raises(kv.CalibrationError, match="cannot be read"):
        read_calibration(tmp_path / "none")
    file = tmp_path / "readers.safetensors"
    monkeypatch.setattr(files, "FORMAT", 9)
    write_calibration(file, calibration)
    monkeypatch.undo()
    with pytest.raises(kv.CalibrationError, match="update kveraser"):
        read_calibration(file)


def test_an_eraser_takes_its_calibration_along(tmp_path):
    model = tiny()
    eraser = kv.KVEraser.new(model, rank=2, repair=5)
    eraser.calibration = calibrate(model, token_ids(300)[0])
    eraser.save_pretrained(tmp_path)
    loaded = kv.KVEraser.from_pretrained(tmp_path, model)
    assert (loaded.repair, loaded.choose) == (5, "readers")
    assert loaded.calibration.scan.layer == eraser.calibration.scan.layer


def with_a_direction(family):
    """A random model whose hidden states, and so its queries, have something in common, as those of trained ones do."""
    model = build(make_config(family))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 0.3 * torch.randn(embedding.shape[1], generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [0, 20])
def test_neutral_states_are_as_good_as_a_mask(family, start):
    model, ids, span = with_a_direction(family), token_ids(120), kv.Span(start, start + 30)
    eraser = kv.KVEraser.neutral(model, repair=0, ids=token_ids(600, seed=2)[0])
    cache, masked = prefill(model, ids[:, :90]), prefill(model, ids[:, :90])
    receipt = kv.erase(model, cache, ids[:, :90], span, eraser=eraser)
    assert (receipt.eraser, receipt.tokens_recomputed, receipt.residual) == ("neutral", 0, None)
    mask = torch.ones_like(ids)
    mask[:, span.slice] = 0
    where = torch.arange(90, 120)[None]
    with torch.no_grad():
        plain = model(ids[:, 90:], past_key_values=cache, position_ids=where).logits.log_softmax(-1)
        hidden = model(ids[:, 90:], past_key_values=masked, position_ids=where, attention_mask=mask)
    truth = hidden.logits.log_softmax(-1)
    assert (truth.exp() * (truth - plain)).sum(-1).mean() < 1e-3


@given(st.data())
def test_a_choice_keeps_to_its_budget_and_takes_the_first_behind_each_span(data):
    length = data.draw(st.integers(20, 200))
    first = data.draw(st.integers(0, length // 2))
    spans = [kv.Span(first, first + 3), kv.Span(first + 5, first + 9)]
    slots = torch.tensor([s for s in range(first + 3, length) if not any(s in span for span in spans)])
    scores = torch.rand(len(slots), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    budget = data.draw(st.integers(1, 80))
    always = first_behind(spans, slots, budget)
    chosen = choose(slots, scores, always, budget)
    assert len(chosen) == min(budget, len(slots))
    assert set(always.tolist()) <= set(chosen.tolist())
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(chosen.tolist()) <= set(slots.tolist())
    left = residual(slots, scores, chosen)
    assert 0 <= left <= 1
    some = choose(slots, scores, always, budget, coverage=0.5)
    assert len(some) <= len(chosen)
    if len(some) < len(chosen):
        assert residual(slots, scores, some) <= 0.5 + 1e-6


def test_one_in_ten_is_not_the_next_reader_but_a_token_between_readers():
    slots = torch.arange(100, 200)
    scores = torch.full((100,), 0.01)
    scores[[40, 41, 43]] = 0.4
    scores[[60, 65, 70, 75, 80, 85]] = 0.07
    scores[42], scores[95] = 0.05, 0.06
    chosen = choose(slots, scores, slots[:0], 10)
    assert chosen.tolist() == [140, 141, 142, 143, 160, 165, 170, 175, 180, 185]
    assert choose(slots, scores, slots[:0], 9).tolist() == [140, 141, 143, 160, 165, 170, 175, 180, 185]
    left = 1 - (3 * 0.4 + 6 * 0.07 + 0.05) / float(scores.sum())  # of what they have read themselves
    assert residual(slots, scores, chosen) == pytest.approx(left)


@given(st.data())
def test_what_is_carried_on_adds_tokens_and_pushes_no_reader_out(data):
    count = data.draw(st.integers(1, 200))
    scores = torch.rand(count, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    slots, budget = torch.arange(count) + 7, data.draw(st.integers(1, 250))
    chosen = choose(slots, scores, slots[:0], budget)
    best = slots[scores.argsort(descending=True, stable=True)[: budget - budget // 10]]
    assert len(chosen) == min(budget, count)
    assert torch.isin(best, chosen).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 9))
def test_what_is_carried_on_halves_from_token_to_token_and_never_goes_back(scores, at):
    read = torch.tensor(scores)
    plain = [sum(0.5**back * scores[i - back] for back in range(min(i, 7) + 1)) for i in range(len(scores))]
    assert carried_on(read).tolist() == pytest.approx(plain, abs=1e-5)
    assert torch.equal(carried_on(read)[:at], carried_on(read[:at]))


@given(st.integers(30, 300), st.integers(0, 25), st.sampled_from([4, 8, 16]), st.integers(0, 9))
def test_blocks_are_whole_runs_on_multiples(length, first, block, seed):
    slots = torch.arange(first, length)
    scores = torch.rand(len(slots), generator=torch.Generator().manual_seed(seed))
    chosen = choose(slots, scores, slots[:2], 4 * block, block=block)
    assert len(chosen) <= 4 * block
    for place in set((chosen // block).tolist()):
        inside = [slot for slot in range(place * block, place * block + block) if first <= slot < length]
        assert set(inside) <= set(chosen.tolist())
    assert int(slots[0]) in chosen.tolist()


def test_rotations_back_and_forth_leave_states_as_they_were():
    model = tiny("gpt_neox")
    turns = Turning.of(model).at(torch.arange(50, 60))
    given = torch.randn(4, 10, 8)
    assert torch.allclose(turns.to_origin(turns.to_place(given, 1), 1), given, atol=1e-5)


def test_probes_are_moved_to_where_they_compute_once():
    made = calibrate(tiny(), token_ids(600)[0])
    device = torch.device("cpu")
    there = made.on(device, torch.bfloat16)
    assert there is made.on(device, torch.bfloat16)
    assert {probe.down.dtype for probe in (there.scan, *there.probes)} == {torch.bfloat16}
    assert made.scan.down.dtype == made.on(device, torch.float32).scan.down.dtype == torch.float32


def test_runs_fill_the_budget_by_what_they_read_alone():
    slots = torch.arange(41, 101)
    scores = torch.full((60,), 0.1)
    scores[20:40] = 0.2
    weights = torch.ones(60)
    weights[-20:] = 100.0
    chosen = choose(slots, scores, slots[:4], 36, weights=weights, block=16)
    assert chosen.tolist() == [
        *range(41, 48),
        *range(64, 80),
    ]  # seven at the border, then the best run; a third does not fit
