"""Fill the tables and numbers of Markdown pages from the folder that the benchmarks write.

`<!-- bench NAME -->` and `<!-- /bench -->` enclose the table of a benchmark and a line of what it was made with;
`<!-- bench NAME FIELD:DIGITS KEY=VALUE ... -->` a number within a sentence: that field of the only row with these values (`_` for a space in them),
with `FIELD:DIGITS%` as a percentage.

Usage: python docs/fill_bench.py BENCH PAGE...
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

MARKED = re.compile(r"(<!-- bench ([\w.-]+)((?: [^>]*?)?) -->).*?(<!-- /bench -->)", re.DOTALL)


def made(document: dict[str, Any]) -> str:
    """What a benchmark was made with; nothing for what is only computed."""
    if "environment" in document:  # of another engine
        facts = dict(document["environment"])
        if isinstance(facts["model"], dict):
            facts["model"] = f"{facts['model']['name']} ({facts['model']['model']})"
        return f"\nMade with: {', '.join(f'{name} {fact}' for name, fact in facts.items())}.\n"
    if "torch" not in document:
        return ""
    return (
        f"\n{document.get('model', 'Embedded model')} in {document['dtype']} on {document['device']} ({document['processor']}, {document['threads']} threads); "
        f"kveraser {document['kveraser']} at {document['commit']}, torch {document['torch']}, transformers {document['transformers']}.\n"
    )


def number(document: dict[str, Any], wanted: str) -> str:
    """One number of one row."""
    field, *conditions = wanted.split()
    name, _, digits = field.partition(":")
    pairs = [condition.split("=", 1) for condition in conditions]
    rows = [row for row in document["rows"] if all(str(row[key]) == value.replace("_", " ") for key, value in pairs)]
    if len(rows) != 1 or rows[0].get(name) is None:
        raise SystemExit(f"a page wants {wanted!r} of {document['benchmark']}: {len(rows)} rows are so")
    percent = digits.endswith("%")
    return f"{rows[0][name]:,.{int(digits.rstrip('%') or 0)}{'%' if percent else 'f'}}"


def fill(page: str, bench: Path) -> str:
    """A page with its tables and numbers made anew."""

    def replaced(mark: re.Match[str]) -> str:
        begin, name, wanted, end = mark.groups()
        document = json.loads((bench / f"{name}.json").read_text(encoding="utf-8"))
        if wanted.strip():
            return f"{begin}{number(document, wanted)}{end}"
        return f"{begin}\n{(bench / f'{name}.md').read_text(encoding='utf-8')}{made(document)}{end}"

    return MARKED.sub(replaced, page)


def main() -> None:
    """Fill the pages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    given = parser.parse_args()
    for page in given.pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), given.bench), encoding="utf-8")


if __name__ == "__main__":
    main()
