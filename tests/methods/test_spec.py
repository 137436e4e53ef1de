"""Methods as text: what is written is what is made, and what is made can be written."""

from __future__ import annotations

import pytest

import kveraser as kv
from kveraser.methods import as_method, method_label, text_options


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("delete-and-shift", kv.DeleteAndShift()),
        ("local-suffix-repair:tokens=64", kv.LocalSuffixRepair(tokens=64)),
        ("selective-recompute:ratio=0.5", kv.SelectiveRecompute(ratio=0.5)),
        ("selective-recompute:ratio=1", kv.SelectiveRecompute(ratio=1)),
        ("kveraser:repair=0", kv.Steering(repair=0)),
        ("kveraser:window=4,128,repair=32", kv.Steering(window=(4, 128), repair=32)),
        ("kveraser:full_prefix=true", kv.Steering(full_prefix=True)),
        ("full-recompute:chunk=256", kv.FullRecompute(chunk=256)),
    ],
)
def test_a_method_and_its_options_are_read_and_written_back(text, method):
    assert as_method(text) == method
    assert method_label(method) == text
    assert as_method(method_label(method)) == method


@pytest.mark.parametrize("name", kv.methods())
def test_every_method_with_its_default_options_is_labelled_by_its_name(name):
    assert method_label(as_method(name)) == name


def test_spaces_do_not_matter_and_defaults_are_not_repeated():
    assert as_method("kveraser: window = 4, 128, repair = none") == kv.Steering(window=(4, 128))
    assert method_label(as_method("local-suffix-repair:tokens=32")) == "local-suffix-repair"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("forget", "no erasing method 'forget'"),
        ("kverasor:repair=3", "did you mean 'kveraser'"),
        ("no-erase:tokens=3", "it has none"),
        ("local-suffix-repair:token=3", "no option 'token=3'"),
        ("local-suffix-repair:tokens", "written as option=value"),
        ("local-suffix-repair:", "no option ''"),
        ("local-suffix-repair:tokens=many", "tokens=many cannot be"),
        ("local-suffix-repair:tokens=1.5", "such as tokens=16"),
        ("local-suffix-repair:tokens=true", "cannot be"),
        ("local-suffix-repair:tokens=none", "cannot be"),
        ("local-suffix-repair:tokens=0", "at least 1"),
        ("kveraser:window=4", "such as window=16,16"),
        ("kveraser:window=4,128,3", "cannot be"),
        ("kveraser:eraser=folder", "it has: window, full_prefix, repair"),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(kv.OptionError, match=said):
        as_method(text)


def test_options_that_hold_objects_are_not_written():
    assert list(text_options(kv.Auto)) == ["patience"]
    assert "eraser" not in text_options(kv.Steering)


@pytest.mark.parametrize(
    "value", ["{[]:1}", "{{}}", "[" * 5000, "(" * 300 + ")" * 300, "9" * 5000, "\0", "-" * 5000 + "1"]
)
def test_whatever_stands_for_a_value_is_an_option_error(value):
    with pytest.raises(kv.OptionError):
        as_method(f"kveraser:repair={value}")
