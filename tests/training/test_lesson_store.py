"""Lessons that are kept: the same loss, computed once, and nothing but what belongs to the run is ever read."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import kveraser as kv
from conftest import build, make_config, make_tokenizer, text_model, token_ids
from kveraser.errors import TrainingError
from kveraser.files import disk
from kveraser.readers import calibrate
from kveraser.training import store as store_module
from kveraser.training import train_eraser
from kveraser.training.config import Stage
from kveraser.training.draws import Drawn, Draws
from kveraser.training.lessons import Erase, Lesson, Probe
from kveraser.training.prepared import prepare
from kveraser.training.rereading import Repairing
from kveraser.training.stage import StageRun
from kveraser.training.store import Keeping, LessonStore

LESSON = Lesson(
    tuple(range(5, 65)),
    (
        Erase(
            (kv.Span(10, 18),),
            (Probe((80, 81, 90), (90, 91), True), Probe((81, 90), (90, 91), True, 0, "query_cached")),
        ),
    ),
    ((80, 81),),
)
DRAWN = Drawn(LESSON, number=3, repair=6)
STAGE = Stage(("needle",))


def kept(folder, model=None, *, limit=10**9, stage=STAGE, seed=1):
    return LessonStore(Keeping(folder, limit), model or text_model(), "finetune", stage, seed)


@lru_cache(maxsize=1)
def calibration():
    return calibrate(text_model(), token_ids(600)[0])


def repairing(learned=False):
    return Repairing(6, calibration(), learned)


@pytest.fixture
def filled(tmp_path):
    """A folder with one lesson."""
    kept(tmp_path / "store").prepared([DRAWN], None)
    return tmp_path / "store"


def piece(folder, what="states"):
    return folder / "finetune" / f"train-000003-{what}.safetensors"


def losses(config, output, keeping=None):
    """The losses of a stage."""
    model, seen = text_model(), []
    options = config.eraser
    eraser = kv.KVEraser.new(model, rank=2, window=options.window, repair=options.repair, acts_on=options.acts_on)
    eraser.calibration = calibration()
    run = StageRun(
        model,
        make_tokenizer(),
        config,
        "finetune",
        eraser,
        output,
        keeping=keeping,
        report=lambda s: seen.append(s.loss),
    )
    run.run()
    return seen


@pytest.mark.parametrize(("acts_on", "repair"), [("spans", (6, 0)), ("readers", (6,))])
def test_over_epochs_the_loss_is_the_same_with_a_store_and_every_lesson_is_computed_once(
    tmp_path, short, monkeypatch, acts_on, repair
):
    stage = replace(
        short.finetune, steps=4, contexts=1, epochs=2, repair=repair, validate_every=4, validation_contexts=1
    )
    config = replace(short, eraser=replace(short.eraser, acts_on=acts_on, repair=6), finetune=stage)
    plain = losses(config, tmp_path / "plain")
    computed = []

    def counted(model, lessons):
        computed.extend(lessons)
        return prefill(model, lessons)

    prefill = store_module.prefill
    monkeypatch.setattr(store_module, "prefill", counted)
    stored = losses(config, tmp_path / "stored", Keeping(tmp_path / "store"))
    assert plain[1:] == pytest.approx(stored[1:], abs=1e-5)
    assert len(computed) == 4 // 2 + 1


def test_every_epoch_takes_every_lesson_once_and_the_first_in_order(short):
    stage = replace(short.finetune, steps=9, contexts=4, epochs=3)
    draws = Draws(1, "finetune", stage, 0, None, None, None)
    draws.lesson = lambda split, number: None
    numbers = [one.number for step in range(9) for one in draws.of_step(step, range(4))]
    epochs = [numbers[at : at + 12] for at in (0, 12, 24)]
    assert epochs[0] == list(range(12))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert {one.repair for one in replaced(draws, (0, 64, 128)).of_step(0, range(4))} == {0, 64, 128}


def replaced(draws, repair):
    draws.stage = replace(draws.stage, repair=repair)
    return draws


@pytest.mark.parametrize("learned", [False, True])
def test_what_is_read_is_what_was_computed_to_the_bit(tmp_path, learned):
    """Prepared with its readers, joined with another lesson, and read by another process's store."""
    other = Drawn(replace(LESSON, ids=tuple(range(9, 60))), number=4, repair=6)
    first = kept(tmp_path / "store").prepared([DRAWN, other], repairing(learned))
    again = kept(tmp_path / "store").prepared([DRAWN, other], repairing(learned))
    direct = prepare(text_model(), [LESSON, other.lesson], repairing(learned))
    assert first.learned == again.learned == direct.learned == learned
    for one, two, three in zip(tensors(first), tensors(again), tensors(direct), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)


def tensors(prepared):
    found = [prepared.teacher, *(part for layer in prepared.prefilled.states for part in layer)]
    found += [part for each in prepared.repairs for part in (each.slots, each.sees)]
    return found + [part for layer in prepared.repaired or () for part in layer]


def test_runs_with_other_erasers_and_batches_share_a_store_and_those_of_another_seed_data_or_model_are_refused(
    tmp_path,
):
    kept(tmp_path / "store").prepared([DRAWN], repairing())
    more = replace(STAGE, contexts=12, epochs=4, learning_rate=1e-4, weights={**STAGE.weights, "cue": 0.1})
    kept(tmp_path / "store", stage=more).prepared([DRAWN], repairing(learned=True))
    for said, options in (
        ("seed was 1, now it is 2", {"seed": 2}),
        ("tokens was", {"stage": replace(STAGE, tokens=(64, 512))}),
        ("backbone.model_type was llama", {"model": build(make_config("qwen2"))}),
        ("dtype was torch.float32, now it is torch.bfloat16", {"model": text_model(torch.bfloat16)}),
    ):
        with pytest.raises(TrainingError, match=said):
            kept(tmp_path / "store", **options)
    with pytest.raises(TrainingError, match="made of another lesson: the text"):
        kept(tmp_path / "store").prepared([replace(DRAWN, lesson=replace(LESSON, ids=tuple(range(6, 66))))], None)


def test_readers_that_another_version_chose_by_another_rule_are_refused(tmp_path, monkeypatch):
    kept(tmp_path / "store").prepared([DRAWN], repairing())
    monkeypatch.setattr(store_module, "RULE", "by lot")
    with pytest.raises(TrainingError, match="readers was the first 8, .*, now it is by lot"):
        kept(tmp_path / "store")


def test_lessons_whose_store_no_longer_says_whose_they_are_are_not_taken_for_anybodys(filled):
    """Two backbones with one tokenizer have the same lessons, and other states."""
    (filled / "finetune" / "store.json").unlink()
    with pytest.raises(TrainingError, match="made of another lesson: .* or the backbone has changed"):
        kept(filled, text_model(torch.bfloat16)).prepared([DRAWN], None)


def test_readers_that_another_version_looked_for_in_another_way_are_refused(tmp_path, monkeypatch):
    kept(tmp_path / "store").prepared([DRAWN], repairing())
    monkeypatch.setattr(store_module, "SIGHT", "with closed eyes")
    with pytest.raises(TrainingError, match="seen was a close look .*, now it is with closed eyes"):
        kept(tmp_path / "store")


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    data = bytearray(file.read_bytes())
    data[random.Random(0).randrange(len(data) // 2, len(data))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.unlink(), "train-000003-states.safetensors is missing"),
        (cut, "altered or cut off"),
        (flip, "its checksum does not fit"),
        (lambda file: file.write_bytes(b""), "altered or cut off"),
        (lambda file: (file.parent / "store.json").write_text("["), "cannot be read"),
        (lambda file: (file.parent / "pieces.txt").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_a_piece_that_is_missing_or_altered_is_named_with_what_to_do(filled, harm, said):
    harm(piece(filled))
    with pytest.raises(TrainingError, match=f"{said}.*delete the folder"):
        kept(filled).prepared([DRAWN], None)


def test_a_store_never_grows_beyond_its_limit_and_says_beforehand_what_would_not_fit(filled, monkeypatch):
    store = kept(filled, limit=100_000)
    with pytest.raises(TrainingError, match=r"keeping 1000 contexts needs about .* GB .*Raise --store-limit"):
        store.check_room([DRAWN], 1000, learned=False)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 1000})())
    with pytest.raises(TrainingError, match="the disk has 0.00 GB"):
        kept(filled).check_room([DRAWN], 1000, learned=False)
    full = kept(filled, limit=store.pieces.used + 100)
    with pytest.raises(TrainingError, match=r"train-000004-states.*raise --store-limit"):
        full.prepared([replace(DRAWN, number=4)], None)
    assert full.pieces.used <= store.pieces.used
    kept(filled).prepared([replace(DRAWN, number=4)], None)


def test_the_size_that_is_told_beforehand_is_that_of_what_is_kept(tmp_path):
    store = kept(tmp_path / "store")
    told = []
    store.pieces.check_room = lambda wanted, what: told.append(wanted)
    store.check_room([DRAWN], 1, learned=False)
    store.prepared([DRAWN], repairing())
    assert 0.5 < told[0] / sum(file.stat().st_size for file in (tmp_path / "store").rglob("*.safetensors")) <= 1


@pytest.mark.parametrize("step", range(0, 7, 2))
def test_a_run_that_is_killed_at_any_step_of_writing_goes_on_to_the_very_same_pieces(tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    kept(tmp_path / "whole").prepared([DRAWN], repairing())
    steps = iter(range(100))

    def stopping(really):
        def one(*arguments):
            if next(steps) >= step:
                raise Killed
            return really(*arguments)

        return one

    with monkeypatch.context() as patched:
        for name in ("create", "write", "replace", "remove", "sync_folder"):
            patched.setattr(disk, name, stopping(getattr(disk, name)))
        with pytest.raises(Killed):
            kept(tmp_path / "parts").prepared([DRAWN], repairing())
    whole, parts = (kept(tmp_path / name).prepared([DRAWN], repairing()) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(parts), strict=True))


def test_partial_files_come_and_go_while_others_write_and_old_ones_are_removed_but_nothing_else(filled, monkeypatch):
    folder = filled / "finetune"
    old, new, going = (f".{name}.safetensors.0123abcd" for name in ("old", "new", "going"))
    theirs = (".env", ".env.0123abcd", ".notes.1234")
    for name in (old, new, going, *theirs):
        (folder / name).write_bytes(b"x")
    (folder / ".safetensors.safetensors.0123abcd").mkdir()
    for name in (old, *theirs, ".safetensors.safetensors.0123abcd"):
        os.utime(folder / name, (0, 0))
    before = {path.name for path in folder.iterdir()}
    real = Path.stat

    def stat(path, **options):
        if path.name == going:
            raise FileNotFoundError(path)
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    kept(filled)
    assert {path.name for path in folder.iterdir()} == before - {old}


def test_a_store_is_counted_again_now_and_then_and_not_for_every_piece(tmp_path, monkeypatch):
    """Looking at every file for every piece would be quadratic in their number."""
    store, counted = kept(tmp_path / "store"), []
    used = type(store.pieces).used.fget
    monkeypatch.setattr(type(store.pieces), "used", property(lambda pieces: counted.append(1) or used(pieces)))
    for number in range(6):
        store.prepared([replace(DRAWN, number=number)], None)
    assert len(counted) == 1


def test_a_full_disk_is_named(filled, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(TrainingError, match=r"No space left.*--store on another disk"):
        kept(filled).prepared([replace(DRAWN, number=4)], None)
    assert not list((filled / "finetune").glob(".*"))


def test_a_run_of_several_epochs_that_was_interrupted_ends_with_the_very_same_weights(tmp_path, short):
    class Stop(Exception):
        pass

    def stop(step):
        if step.step == 2:
            raise Stop

    stage = replace(short.finetune, steps=3, epochs=3, contexts=1, validation_contexts=1, validate_every=3)
    config = replace(short, finetune=stage, eraser=replace(short.eraser, repair=6, hidden=0))
    model, tokens = text_model(), make_tokenizer()
    train_eraser(model, tokens, config, tmp_path / "whole", stages=["finetune"])
    with pytest.raises(Stop):
        train_eraser(model, tokens, config, tmp_path / "parts", stages=["finetune"], report=stop)
    train_eraser(model, tokens, config, tmp_path / "parts", stages=["finetune"])
    assert (tmp_path / "whole" / "lessons" / "finetune" / "store.json").exists()
    whole, parts = (
        torch.load(tmp_path / name / "finetune" / "checkpoint.pt", weights_only=True)["weights"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
