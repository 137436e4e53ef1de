"""Data tasks: deterministic, and nothing of training is in evaluation."""

from __future__ import annotations

import itertools
import json
import random

import pytest

import kveraser as kv
from kveraser.tasks import (
    Filler,
    Sizes,
    as_task,
    injection,
    needle,
    preference,
    read_passages,
    tasks,
    tool_observation,
    words,
)


def filler():
    return Filler([f"Passage {n} is about things. It has {n} sentences of some length. They go on for a while." for n in range(30)],
                  lambda text: len(text.split()))  # fmt: skip


def take(name, split, count=20, seed=0):
    return list(itertools.islice(as_task(name).examples(filler(), Sizes(), split, seed), count))


@pytest.mark.parametrize("name", tasks())
def test_the_same_seed_gives_the_same_examples(name):
    assert take(name, "train") == take(name, "train")
    assert take(name, "train") != take(name, "train", seed=1)


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_erased_answer_is_supported_by_the_span_alone(name, split):
    for example in take(name, split, 60):
        assert example.erased in example.span
        assert example.question
        if example.gold is not None:
            assert example.gold in example.prefix + example.suffix
            assert example.gold != example.erased
        assert example.answer


@pytest.mark.parametrize("source", [words, needle, tool_observation, preference, injection])
def test_templates_names_and_values_of_the_two_splits_are_disjoint(source):
    pools = [
        value for value in vars(source).values() if callable(value) and getattr(value, "__name__", "") == "<lambda>"
    ]
    assert pools
    for pool in pools:
        train, held_out = pool("train"), pool("eval")
        assert train
        assert held_out
        assert not set(train) & set(held_out)


def test_passages_of_the_two_splits_are_disjoint():
    source = filler()
    rng = random.Random(0)
    seen = {
        split: {s for _ in range(100) for s in source.text(rng, 30, split).split(". ")} for split in ("train", "eval")
    }
    passages = {split: {s for s in texts if s.startswith("Passage")} for split, texts in seen.items()}
    assert passages["train"]
    assert not passages["train"] & passages["eval"]


def test_filler_has_about_the_length_that_was_asked_for():
    source = filler()
    for tokens in (5, 50, 200):
        assert tokens <= len(source.text(random.Random(1), tokens, "train").split()) < tokens + 20


def test_text_comes_from_files_folders_or_python_itself(tmp_path):
    (tmp_path / "a.txt").write_text("One passage.\n\nAnother passage.")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "A third."}]))
    assert read_passages(tmp_path / "a.txt") == ["One passage.", "Another passage."]
    assert read_passages(tmp_path) == ["One passage.", "Another passage."]
    assert read_passages(tmp_path / "b.json") == ["A third."]
    assert len(read_passages()) > 500


def test_bad_sources_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, words_ in (("none.txt", "no text source"), ("bytes.txt", "cannot read")):
        with pytest.raises(kv.OptionError, match=words_):
            read_passages(tmp_path / name)
    with pytest.raises(kv.OptionError, match="usable passages"):
        Filler(read_passages(tmp_path / "empty.txt"), len)
    with pytest.raises(kv.OptionError, match="no task 'x'"):
        as_task("x")
