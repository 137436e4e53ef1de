"""Files of text."""

from __future__ import annotations

import json

from kveraser.tasks import read_passages


def test_lines_of_a_text_file_end_where_jsons_lines_end(tmp_path):
    """Texts have line separators of their own, which JSON need not escape."""
    texts = ["one\u2028two", "three\u0085four", "five\x1csix"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts[:2]] + [json.dumps(texts[2])]
    (tmp_path / "raw.jsonl").write_text("\r\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_passages(tmp_path / "raw.jsonl") == texts
