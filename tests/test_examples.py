"""The examples that need no server, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import kveraser as kv
from conftest import make_tokenizer, text_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_who_read_it_draws_the_heat_of_a_text_of_ones_own(tmp_path, monkeypatch, capsys):
    model = text_model()
    monkeypatch.setattr(kv, "load_backbone", lambda name: (model, make_tokenizer()))
    text = tmp_path / "notes.txt"
    text.write_text(
        "the code is 1234. " + "the car is blue and fast. it has a door with a code. " * 12, encoding="utf-8"
    )
    picture = tmp_path / "heat.png"
    monkeypatch.setattr("sys.argv", ["x", str(text), "the code is 1234.", "--tokens", "8", "--output", str(picture)])
    runpy.run_path(str(EXAMPLES / "who_read_it.py"), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Recomputed 8 of" in capsys.readouterr().out
