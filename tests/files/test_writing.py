"""Who can read what is written."""

from __future__ import annotations

import os

import pytest

from conftest import random_eraser, text_model, token_ids
from kveraser.export import write_peft_folder
from kveraser.files import write_atomically
from kveraser.readers import calibrate


def mode(file):
    return file.stat().st_mode & 0o777


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
@pytest.mark.parametrize(("mask", "readable"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_is_readable_by_whom_the_umask_says_and_a_private_one_by_its_user_alone(tmp_path, umask, mask, readable):
    umask(mask)
    write_atomically(tmp_path / "plain", b"x")
    write_atomically(tmp_path / "secret", b"x", private=True)
    assert [mode(tmp_path / name) for name in ("plain", "secret")] == [readable, 0o600]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
def test_an_eraser_and_what_is_exported_of_it_can_be_read_by_others(tmp_path, umask):
    """A server that loads an adapter mostly runs as another user."""
    eraser = random_eraser(text_model())
    eraser.calibration = calibrate(text_model(), token_ids(600)[0])
    source = eraser.save_pretrained(tmp_path / "eraser")
    write_peft_folder(source, tmp_path / "peft")
    files = [*source.iterdir(), *(tmp_path / "peft").iterdir()]
    assert len(files) == 4 + 3
    assert {file.name for file in files if mode(file) != 0o644} == set()
