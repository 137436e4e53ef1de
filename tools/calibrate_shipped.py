"""Make what tells readers for an eraser that ships, and put it beside the eraser.

Example: python tools/calibrate_shipped.py smollm2-135m-instruct --text passages.json
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from kveraser import load_backbone
from kveraser.context.text import any_text
from kveraser.eraser import shipped_erasers
from kveraser.readers import FILE_NAME, MOST_TOKENS, calibrate, write_calibration
from kveraser.tasks import Filler
from kveraser.tasks.sources import read_passages


def main() -> None:
    """Calibrate, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(shipped_erasers()), help="the backbone")
    parser.add_argument(
        "--text", help="a text source as for `kveraser train`; default: what a first erase calibrates on"
    )
    parser.add_argument("--seed", type=int, default=5, help="of what is taken of that source")
    parser.add_argument("--output", type=Path, help="folder to write it to; default: beside the eraser that ships")
    options = parser.parse_args()
    model, tokenizer = load_backbone(options.name, dtype="fp32")  # on every machine
    text = any_text()
    if options.text:
        filler = Filler(read_passages(options.text), lambda part: len(tokenizer.encode(part, add_special_tokens=False)))
        text = filler.text(random.Random(options.seed), MOST_TOKENS + 200, "train")
    made = calibrate(model, tokenizer.encode(text, add_special_tokens=False)[:MOST_TOKENS])
    file = (options.output or shipped_erasers()[options.name]) / FILE_NAME
    write_calibration(file, made)
    print(
        f"{file}: {file.stat().st_size:,} bytes; layers {[probe.layer for probe in made.probes]}, {made.explained:.1%} explained"
    )


if __name__ == "__main__":
    main()
