"""What of an output folder is a run's own: nothing else in it is replaced or removed, and that is said before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conftest import make_tokenizer, text_model
from kveraser.errors import TrainingError
from kveraser.training import train_eraser


def run(config, output, **options):
    return train_eraser(text_model(), make_tokenizer(), config, output, stages=["pretrain"], **options)


@pytest.fixture
def brief(short):
    """A stage of one step on one context."""
    return replace(
        short, pretrain=replace(short.pretrain, steps=1, contexts=1, validate_every=1, validation_contexts=1)
    )


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("eraser/my_source.py", r"eraser holds my_source\.py"),
        ("eraser/README.md", r"eraser holds no kveraser\.json"),
        ("eraser", "eraser is no folder"),
        ("pretrain/best/weights.bin", r"best holds weights\.bin"),
        ("pretrain/train.jsonl", r"train\.jsonl is not the log of a run"),
        ("config.yaml", r"config\.yaml is not the configuration of a run"),
    ],
)
def test_what_a_run_would_replace_and_did_not_write_is_named_and_left_alone(tmp_path, brief, theirs, said):
    """`-o .` in a project that has a folder of that name: it was gone."""
    file = tmp_path / "project" / theirs
    file.parent.mkdir(parents=True)
    file.write_text('{"text": "precious"}\n')
    before, seen = files(tmp_path / "project"), []
    for fresh in (False, True):
        with pytest.raises(TrainingError, match=f"{said}.*another output folder"):
            run(brief, tmp_path / "project", fresh=fresh, report=seen.append)
    assert files(tmp_path / "project") == before
    assert not seen


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("pretrain/data.csv", r"pretrain holds data\.csv"),
        ("pretrain/.env", r"pretrain holds \.env"),
        ("pretrain/tensorboard/notes.md", r"tensorboard holds notes\.md"),
    ],
)
def test_what_fresh_would_remove_and_training_did_not_write_is_named_and_left_alone(tmp_path, brief, theirs, said):
    run(brief, tmp_path / "run")
    (tmp_path / "run" / theirs).write_text("precious")
    before = files(tmp_path / "run")
    with pytest.raises(TrainingError, match=f"{said}.*another output folder"):
        run(brief, tmp_path / "run", fresh=True)
    assert files(tmp_path / "run") == before
    run(brief, tmp_path / "run")  # nothing is removed


def test_a_stage_folder_is_not_taken_for_a_runs_by_the_name_of_its_checkpoint_alone(tmp_path, brief):
    (tmp_path / "project" / "pretrain").mkdir(parents=True)
    (tmp_path / "project" / "pretrain" / "checkpoint.pt").write_text("precious")
    with pytest.raises(TrainingError, match=r"pretrain holds neither best/ nor train\.jsonl"):
        run(brief, tmp_path / "project", fresh=True)
    assert (tmp_path / "project" / "pretrain" / "checkpoint.pt").read_text() == "precious"


def test_what_a_killed_run_leaves_is_its_own_and_goes_with_fresh(tmp_path, brief):
    run(brief, tmp_path / "run")
    folder = tmp_path / "run" / "pretrain"
    (folder / ".checkpoint.pt.0123abcd").write_bytes(b"half")
    (folder / "best" / ".readers.safetensors.0123abcd").write_bytes(b"half")
    (folder / ".best.new").mkdir()
    (folder / "train.jsonl").write_text('{"st')
    run(brief, tmp_path / "run", fresh=True)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "checkpoint.pt", "tensorboard", "train.jsonl"]


def test_what_is_put_beside_the_result_while_a_run_trains_is_not_lost_and_the_run_can_go_on(tmp_path, brief):
    run(brief, tmp_path / "run")
    mine = tmp_path / "run" / "eraser" / "mine.gguf"
    with pytest.raises(TrainingError, match=r"eraser holds mine\.gguf.*move it away"):
        run(brief, tmp_path / "run", fresh=True, report=lambda step: mine.write_text("precious"))
    assert mine.read_text() == "precious"
    mine.unlink()
    run(brief, tmp_path / "run")
