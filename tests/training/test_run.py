"""Runs: what they leave, that they can be interrupted anywhere, and that processes add up."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from worker import learn

import kveraser as kv
from conftest import build, make_config, make_tokenizer, prefill, states, text_model, write_corpus
from kveraser.errors import TrainingError
from kveraser.training import Stage, checkpoint, train_eraser
from kveraser.training.folders import held
from kveraser.training.stage import StageRun
from processes import start


def run(config, output, **options):
    return train_eraser(text_model(), make_tokenizer(), config, output, **options)


@pytest.fixture
def brief(short):
    """Stages of one step on one context."""
    options = {"steps": 1, "contexts": 1, "validate_every": 1, "validation_contexts": 1}
    return replace(short, pretrain=replace(short.pretrain, **options), finetune=replace(short.finetune, **options))


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]


def test_both_stages_lower_kl_and_leave_an_eraser_logs_and_a_card(tmp_path, short):
    model, seen = text_model(), []
    before = states(prefill(model, torch.tensor([[5, 6, 7]])))
    longer = replace(short, finetune=replace(short.finetune, steps=16, contexts=3, validate_every=8))
    eraser = run(longer, tmp_path / "run", report=seen.append)
    tuned = [step for step in seen if step.stage == "finetune" and step.validation]
    first = next(step for step in seen if step.stage == "pretrain" and step.validation)
    assert tuned[-1].best < 0.95 * max(first.validation.mean, tuned[0].validation.mean)
    assert eraser.window == (2, 16)
    assert eraser.config.notes["training"]["finetune"]["steps"] == 16
    assert eraser.config.notes["training"]["text"] == "corpus.txt"
    for stage, steps in (("pretrain", 4), ("finetune", 16)):
        folder = tmp_path / "run" / stage
        log = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log] == list(range(steps + 1))
        assert sorted(p.name for p in folder.iterdir()) == ["best", "checkpoint.pt", "tensorboard", "train.jsonl"]
    card = (tmp_path / "run" / "eraser" / "README.md").read_text()
    assert "needle, injection" in card
    assert str(tmp_path) not in card
    after = states(prefill(model, torch.tensor([[5, 6, 7]])))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_stage_in_chat_form_trains_and_without_a_template_is_refused_before_anything_is_written(tmp_path, short):
    chat = replace(short, finetune=replace(short.finetune, chat=True, steps=1))
    run(chat, tmp_path / "run", stages=["finetune"])
    assert (tmp_path / "run" / "eraser" / "kveraser.json").exists()
    bare = copy.deepcopy(make_tokenizer())
    bare.chat_template = None
    with pytest.raises(kv.OptionError, match="has no chat template"):
        train_eraser(text_model(), bare, chat, tmp_path / "none", stages=["finetune"])
    assert not (tmp_path / "none").exists()


def test_finetuning_starts_from_pretraining_or_from_a_given_eraser(tmp_path, short):
    once = replace(short, finetune=replace(short.finetune, steps=1, learning_rate=1e-12, weight_decay=0.0))
    pretrained = run(once, tmp_path / "a", stages=["pretrain"])
    continued = run(once, tmp_path / "a", stages=["finetune"])
    given = run(once, tmp_path / "b", stages=["finetune"], start=tmp_path / "a" / "pretrain" / "best")
    for a, b, c in zip(pretrained.parameters(), continued.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        assert torch.equal(b, c)
    with pytest.raises(kv.EraserMismatchError, match="eraser.rank=2"):
        bigger = replace(short, eraser=replace(short.eraser, rank=4))
        run(bigger, tmp_path / "c", stages=["finetune"], start=tmp_path / "a" / "eraser")
    other = replace(once, eraser=replace(once.eraser, values="learned"))
    with pytest.raises(kv.EraserMismatchError, match="has values own, the configuration says learned"):
        run(other, tmp_path / "c", stages=["finetune"], start=tmp_path / "a" / "eraser")


def test_a_run_that_was_interrupted_ends_with_the_very_same_weights(tmp_path, short):
    class Stop(Exception):
        pass

    def stop(step):
        if step.step == 3:
            raise Stop

    run(short, tmp_path / "whole", stages=["finetune"])
    with pytest.raises(Stop):
        run(short, tmp_path / "parts", stages=["finetune"], report=stop)
    seen = []
    run(short, tmp_path / "parts", stages=["finetune"], report=seen.append)
    assert [step.step for step in seen] == [4]
    whole, parts = (weights(tmp_path / name / "finetune") for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    log = [json.loads(line)["step"] for line in (tmp_path / "parts" / "finetune" / "train.jsonl").open()]
    assert log == [0, 1, 2, 3, 4]


def learned(output, corpus, *, kill_at=None, processes=1):
    """What each of the processes of a run has answered, and how each ended; they are told of each other as `torchrun` does it."""
    output.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    here |= {"LOCAL_WORLD_SIZE": str(processes), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    answers = [output / f"answer-{rank}-{kill_at}.json" for rank in range(processes)]
    started = []
    for rank, answer in enumerate(answers):
        own = {**here, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        log = answer.with_suffix(".log")
        started.append(start(learn, output / "run", corpus, answer, kill_at, log=log, **own))
    for process in started:
        process.join(300)
    said = [json.loads(answer.read_text()) if answer.exists() else None for answer in answers]
    return said, [process.exitcode for process in started]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The answer of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (answer,), (ended,) = learned(folder / "run", write_corpus(folder))
    assert ended == 0, next((folder / "run").glob("*.log")).read_text()
    return answer


@pytest.mark.long
def test_a_killed_process_goes_on_to_the_very_same_weights(tmp_path, corpus, whole):
    (nothing,), (ended,) = learned(tmp_path / "killed", corpus, kill_at=5)
    assert ended == -signal.SIGKILL
    assert nothing is None
    (resumed,), _ = learned(tmp_path / "killed", corpus)
    assert resumed["losses"] == whole["losses"][5:]
    assert (resumed["best"], resumed["last"]) == (whole["best"], whole["last"])


def test_a_process_without_lessons_adds_nothing_of_another_kind(tmp_path, brief):
    """Eight processes and six contexts: two have none, and all must exchange numbers of one size."""
    reduced = []

    class Alone(Accelerator):
        def reduce(self, tensor, *arguments, **options):
            reduced.append(tensor.dtype)
            return super().reduce(tensor, *arguments, **options)

    stage = StageRun(
        text_model(), make_tokenizer(), brief, "pretrain", kv.KVEraser.new(text_model(), rank=2), tmp_path / "one",
        accelerator=Alone(),
    )  # fmt: skip
    stage._own = lambda count: range(0)
    stage.train_step()
    assert reduced[0] is torch.float32


@pytest.mark.long
def test_two_processes_learn_what_one_does(tmp_path, corpus, whole):
    (first, second), ended = learned(tmp_path / "two", corpus, processes=2)
    assert ended == [0, 0], (tmp_path / "two" / "answer-0-None.log").read_text()[-2000:]
    assert first["best"] == second["best"]
    assert not second["losses"]  # only the main process reports
    for alone, shared in zip(whole["losses"], first["losses"], strict=True):
        assert math.isclose(alone, shared, rel_tol=1e-5, abs_tol=1e-9)


def test_a_checkpoint_of_another_run_is_refused_and_fresh_forgets_it(tmp_path, short):
    run(short, tmp_path / "run", stages=["pretrain"])
    other = replace(short, pretrain=replace(short.pretrain, learning_rate=1e-3))
    with pytest.raises(TrainingError, match="pretrain.learning_rate was 0.005, now it is 0.001"):
        run(other, tmp_path / "run", stages=["pretrain"])
    run(other, tmp_path / "run", stages=["pretrain"], fresh=True)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, short):
    other = build(make_config("qwen2", vocab_size=len(make_tokenizer())))
    run(short, tmp_path / "run", stages=["pretrain"])
    with pytest.raises(TrainingError, match="backbone"):
        train_eraser(other, make_tokenizer(), short, tmp_path / "run", stages=["pretrain"])


def flip(file):
    """One bit of a weight."""
    data, weight = bytearray(file.read_bytes()), weights(file.parent)[0].numpy().tobytes()
    data[data.index(weight)] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(b"nothing"), flip], ids=["nothing", "one bit"])
def test_a_damaged_checkpoint_is_named(tmp_path, short, harm):
    run(short, tmp_path / "run", stages=["pretrain"])
    harm(tmp_path / "run" / "pretrain" / "checkpoint.pt")
    with pytest.raises(TrainingError, match="cannot read"):
        run(short, tmp_path / "run", stages=["pretrain"])


def test_what_is_wrong_is_said_before_fresh_removes_anything(tmp_path, brief):
    """As a mistyped text did: the trained stages were gone, and then it was said."""
    run(brief, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(kv.OptionError, match="no text source"):
        run(replace(brief, text=str(tmp_path / "none.txt")), tmp_path / "run", fresh=True)
    with pytest.raises(kv.OptionError, match=r"start=.*best is in .*finetune, which fresh removes"):
        run(brief, tmp_path / "run", fresh=True, start=tmp_path / "run" / "finetune" / "best")
    with pytest.raises(kv.EraserMismatchError, match="eraser.rank=2"):
        other = replace(brief, eraser=replace(brief.eraser, rank=4))
        run(other, tmp_path / "run", stages=["finetune"], fresh=True, start=tmp_path / "run" / "eraser")
    assert files(tmp_path / "run") == before


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_that_is_refused_changes_nothing_not_even_the_configuration(tmp_path, brief):
    run(brief, tmp_path / "run", stages=["pretrain"])
    before = files(tmp_path / "run")
    with pytest.raises(TrainingError, match="is of another run"):
        run(replace(brief, seed=1), tmp_path / "run", stages=["pretrain"])
    assert files(tmp_path / "run") == before


def test_a_stage_whose_start_has_changed_is_no_longer_done(tmp_path, brief):
    """It was taken for finished, and the eraser of before was published again."""
    run(brief, tmp_path / "run")
    other = replace(brief, pretrain=replace(brief.pretrain, learning_rate=1e-3))
    run(other, tmp_path / "run", stages=["pretrain"], fresh=True)
    with pytest.raises(TrainingError, match="is of another run: start was"):
        run(other, tmp_path / "run", stages=["finetune"])


def test_a_run_in_another_type_is_another_run(tmp_path, brief):
    run(brief, tmp_path / "run", stages=["pretrain"])
    with pytest.raises(TrainingError, match="dtype was torch.float32, now it is torch.bfloat16"):
        train_eraser(text_model(torch.bfloat16), make_tokenizer(), brief, tmp_path / "run", stages=["pretrain"])


def test_a_folder_is_for_one_run_at_a_time(tmp_path, brief):
    with held(tmp_path / "run"), pytest.raises(TrainingError, match="another run is training in .*run; wait for it"):
        run(brief, tmp_path / "run", stages=["pretrain"])
    run(brief, tmp_path / "run", stages=["pretrain"])


@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("where", ["finetune/best", "eraser"])
def test_a_run_that_is_killed_while_a_result_is_replaced_loses_neither(tmp_path, brief, monkeypatch, where, renames):
    class Killed(BaseException):
        pass

    target, done, really = tmp_path / "run" / where, [], Path.rename

    def rename(path, new):
        if target in (path, new) and target.exists() | bool(done):  # there is something to replace
            if len(done) == renames:
                raise Killed
            done.append(path)
        return really(path, new)

    whole = run(brief, tmp_path / "whole", stages=["finetune"])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            run(brief, tmp_path / "run", stages=["finetune"])
            run(brief, tmp_path / "run", stages=["finetune"])  # the result is replaced by the second run at the latest
    resumed = run(brief, tmp_path / "run", stages=["finetune"])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]


def test_a_checkpoint_without_its_best_eraser_is_refused_at_once(tmp_path, brief):
    run(brief, tmp_path / "run", stages=["pretrain"])
    shutil.rmtree(tmp_path / "run" / "pretrain" / "best")
    with pytest.raises(TrainingError, match="its best/ is gone"):
        run(brief, tmp_path / "run", stages=["pretrain"])


def test_a_start_is_taken_over_as_it_is_or_refused_with_all_that_differs(tmp_path, brief):
    """Twice the alpha would be another function from the first step on."""
    run(brief, tmp_path / "a", stages=["pretrain"])
    start = tmp_path / "a" / "eraser"
    other = replace(brief, eraser=replace(brief.eraser, rank=4, alpha=8, acts_on="readers", repair=6))
    with pytest.raises(kv.EraserMismatchError, match="eraser.rank=2 --set eraser.alpha=4 --set eraser.acts_on=spans"):
        run(other, tmp_path / "b", stages=["finetune"], start=start)


def test_a_backbone_whose_spans_cannot_be_hidden_says_so(tmp_path, brief):
    model = build(make_config("qwen3", vocab_size=len(make_tokenizer())))
    with pytest.warns(UserWarning, match="eraser.hidden=8.0 has no effect"):
        train_eraser(model, make_tokenizer(), brief, tmp_path / "run", stages=["pretrain"])


@pytest.mark.parametrize("unasked", ["query_after", "query_cached"])
def test_one_protocol_alone_is_validated_and_described_alone(tmp_path, brief, unasked):
    weights = {**brief.finetune.weights, unasked: 0}
    seen = []
    eraser = run(
        replace(brief, finetune=replace(brief.finetune, weights=weights)),
        tmp_path / "run",
        stages=["finetune"],
        report=seen.append,
    )
    assert seen[-1].best == min(step.validation.mean for step in seen if step.validation) > 0
    kl = eraser.config.notes["validation_kl"]
    assert [asked for asked, value in kl.items() if value is None] == [unasked]
    assert "not asked" in (tmp_path / "run" / "eraser" / "README.md").read_text()


def test_a_stage_that_is_done_says_where_it_ended(tmp_path, brief):
    first, again = [], []
    run(brief, tmp_path / "run", stages=["pretrain"], report=first.append)
    run(brief, tmp_path / "run", stages=["pretrain"], report=again.append)
    assert [(step.step, step.best) for step in again] == [(1, first[-1].best)]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_eraser(tmp_path, short):
    wild = replace(short, pretrain=replace(short.pretrain, learning_rate=1e30, clip=1e30, warmup=0))
    with pytest.raises(TrainingError, match="learning_rate=1e"):
        run(wild, tmp_path / "run", stages=["pretrain"])
    kept = kv.KVEraser.from_pretrained(tmp_path / "run" / "pretrain" / "best", text_model())
    assert all(torch.isfinite(parameter).all() for parameter in kept.parameters())


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_are_touched(tmp_path, short, monkeypatch):
    """As cuDNN's attention gave it: the loss was a number, the step after it was not, and the checkpoint was lost, too."""
    real, steps = StageRun._add_gradients, []

    def spoil(self):
        real(self)
        steps.append(self.step)
        if self.step == 2:
            next(p for p in self.parameters if p.grad is not None).grad[0] = math.nan

    monkeypatch.setattr(StageRun, "_add_gradients", spoil)
    often = replace(short, pretrain=replace(short.pretrain, checkpoint_every=1))
    with pytest.raises(TrainingError, match=r"gradient's norm became nan at step 3 of pretrain.*learning_rate"):
        run(often, tmp_path / "run", stages=["pretrain"])
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run" / "pretrain"))
    monkeypatch.undo()
    run(often, tmp_path / "run", stages=["pretrain"])
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("where", ["checkpoint", "best", "log", "result"])
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, short, monkeypatch, where):
    run(replace(short, pretrain=replace(short.pretrain, steps=4)), tmp_path / "run", stages=["pretrain"])
    kept = (tmp_path / "run" / "pretrain" / "checkpoint.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if where == "checkpoint":
        monkeypatch.setattr(checkpoint, "write_atomically", full)
    elif where == "best":
        monkeypatch.setattr("kveraser.eraser.eraser.write_atomically", full)
    elif where == "log":
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    else:
        monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(TrainingError, match="No space left"):
        run(short, tmp_path / "other", stages=["pretrain"])
    assert (tmp_path / "run" / "pretrain" / "checkpoint.pt").read_bytes() == kept
    assert not [path for path in (tmp_path / "other").rglob(".*") if path.name != ".lock"]


def test_an_output_that_is_a_file_is_named(tmp_path, brief):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(TrainingError, match="cannot write to .*run"):
        run(brief, tmp_path / "run", stages=["pretrain"])
    assert (tmp_path / "run").read_text() == "mine"


def test_patience_ends_a_stage_that_no_longer_improves(tmp_path, short):
    stage = replace(short.pretrain, steps=50, learning_rate=1e-12, weight_decay=0.0, validate_every=1, patience=2)
    seen = []
    run(replace(short, pretrain=stage), tmp_path / "run", stages=["pretrain"], report=seen.append)
    assert seen[-1].step < 10


def test_bad_input_is_refused_before_anything_is_trained(tmp_path, short):
    (tmp_path / "empty.txt").write_text("")
    for text, said in ((str(tmp_path / "none.txt"), "no text source"), (str(tmp_path / "empty.txt"), "holds no text")):
        with pytest.raises(kv.OptionError, match=said):
            run(replace(short, text=text), tmp_path / "run")
    (tmp_path / "short.txt").write_text("Too short.\n\nAlso short.")
    with pytest.raises(kv.OptionError, match="usable passages"):
        run(replace(short, text=str(tmp_path / "short.txt")), tmp_path / "run")
    with pytest.raises(kv.OptionError, match="at least one task"):
        run(replace(short, pretrain=Stage()), tmp_path / "run")
