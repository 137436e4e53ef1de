"""The configuration of a run: presets, YAML, single keys, and what is refused."""

from __future__ import annotations

import pytest
import yaml

import kveraser as kv
from kveraser.training import PRESETS, EraserOptions, Stage, TrainConfig, read_config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_being_written_and_read(tmp_path, preset):
    config = read_config(preset=preset)
    config.write(tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_a_file_changes_the_preset_and_single_keys_change_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"finetune": {"steps": 7, "weights": {"cue": 0}}, "eraser": {"window": None}}))
    config = read_config(file, "tiny", ["finetune.learning_rate=1e-4", "eraser.rank=4"], text="corpus.txt")
    tiny = read_config(preset="tiny")
    assert (config.finetune.steps, config.finetune.learning_rate) == (7, 1e-4)
    assert config.finetune.weights == {**tiny.finetune.weights, "cue": 0}
    assert (config.eraser.window, config.eraser.rank, config.text) == (None, 4, "corpus.txt")
    assert config.pretrain == tiny.pretrain


def test_an_eraser_on_readers_is_never_trained_without_any():
    assert read_config(changes=["eraser.acts_on=readers", "finetune.repair=[8, 64]"]).finetune.repair == (8, 64)
    with pytest.raises(kv.OptionError, match=r"acts_on=readers needs readers: finetune.repair=\[0, 64\] has a 0"):
        read_config(changes=["finetune.repair=[0, 64]", "eraser.acts_on=readers"])
    with pytest.raises(kv.OptionError, match="acts_on=readers steers no spans: values=learned is for these"):
        read_config(changes=["eraser.acts_on=readers", "eraser.values=learned"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("finetune.stepz=3", "finetune.stepz"),
        ("finetune.steps=many", "finetune.steps='many'"),
        ("finetune.steps=0", "steps=0 must be at least 1"),
        ("finetune.epochs=0", "epochs=0 must be at least 1"),
        ("finetune.tasks=[juggling]", "no task 'juggling'"),
        ("finetune.weights={query_after: 0, query_cached: 0}", "query_after or query_cached must be above 0"),
        ("finetune.tokens=[300, 20]", "least <= most"),
        ("finetune.weights.luck=1", "weights.luck"),
        ("eraser=3", "expected the keys rank"),
        ("eraser.window=[1, -2]", "window"),
        ("steps", "not of the form key=value"),
        ("finetune.steps=[", "cannot be read"),
    ],
)
def test_impossible_values_are_named(change, said):
    with pytest.raises(kv.OptionError) as error:
        read_config(preset="tiny", changes=[change])
    assert said in str(error.value)


def test_a_file_of_questions_is_not_trained_on(questions_file):
    with pytest.raises(kv.OptionError, match="questions.json has a file of its own, which is for evaluation only"):
        read_config(changes=[f"finetune.tasks=[document-qa={questions_file}]"])


def test_unreadable_files_and_unknown_presets_are_named(tmp_path):
    with pytest.raises(kv.OptionError, match="cannot read the configuration"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(kv.OptionError, match="there are: cpu"):
        read_config(preset="huge")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(kv.OptionError, match="expected the keys"):
        read_config(tmp_path / "list.yaml")


def test_dataclasses_check_themselves():
    for build in (
        lambda: Stage(contexts=0),
        lambda: Stage(weights={"cue": 0.0}),
        lambda: Stage(average=1.0),
        lambda: Stage(learning_rate=0.0),
        lambda: EraserOptions(rank=0),
        lambda: EraserOptions(repair=-1),
        lambda: TrainConfig(finetune=Stage(("x",))),
    ):
        with pytest.raises(kv.OptionError):
            build()
