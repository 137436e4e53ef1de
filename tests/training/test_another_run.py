"""What makes a run another one beside its options: what its text says, and how its readers are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import make_tokenizer, text_model
from kveraser.errors import TrainingError
from kveraser.training import train_eraser


def run(config, output):
    return train_eraser(text_model(), make_tokenizer(), config, output, stages=["pretrain"])


@pytest.fixture
def brief(short):
    """A stage of one step on one context."""
    return replace(
        short, pretrain=replace(short.pretrain, steps=1, contexts=1, validate_every=1, validation_contexts=1)
    )


def test_a_run_whose_text_says_something_else_is_another_run(tmp_path, brief):
    """The same file with other contents, or Python's own documentation after an update: it went on with other lessons."""
    run(brief, tmp_path / "run")
    text = Path(brief.text)
    text.write_text(text.read_text().replace("blue", "green"))
    with pytest.raises(TrainingError, match="is of another run: text_sha256 was .*, now it is "):
        run(brief, tmp_path / "run")
    other = text.with_name("other.txt")
    other.write_text("\n\n".join(f"The house number {n} is large and old. Nobody has lived there." for n in range(9)))
    with pytest.raises(TrainingError, match=r"is of another run: text was .*corpus\.txt, now it is .*other\.txt"):
        run(replace(brief, text=str(other)), tmp_path / "run")


@pytest.mark.parametrize(("name", "said"), [("RULE", "readers was the first"), ("SIGHT", "seen was a close look")])
def test_a_run_whose_readers_another_version_chose_is_another_run_where_there_are_any(
    tmp_path, brief, monkeypatch, name, said
):
    reading = replace(brief, pretrain=replace(brief.pretrain, repair=(4,)))
    run(reading, tmp_path / "readers")
    without = replace(brief, eraser=replace(brief.eraser, repair=0))
    run(without, tmp_path / "none")
    monkeypatch.setattr(f"kveraser.training.stage.{name}", "by lot")
    with pytest.raises(TrainingError, match=f"is of another run: {said}.*now it is by lot"):
        run(reading, tmp_path / "readers")
    run(without, tmp_path / "none")


def test_a_checkpoint_that_does_not_say_what_its_text_was_is_refused(tmp_path, brief):
    """As those of earlier versions do not: whether it is the same text cannot be known."""
    run(brief, tmp_path / "run")
    file = tmp_path / "run" / "pretrain" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    del state["run"]["text_sha256"]
    torch.save(state, file)
    with pytest.raises(TrainingError, match="text_sha256 was not noted, now it is"):
        run(brief, tmp_path / "run")
