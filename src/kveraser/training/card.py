"""The model card that is saved beside an eraser.

Knows: what a run notes about itself. Does not know about models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FILE_NAME = "README.md"
_TEXT = """---
library_name: peft
tags: [kveraser, kv-cache, lora]
---

# A KVEraser

A LoRA that makes *steering states*: it re-encodes a span that has to leave a context, and the keys and values of that pass
replace the span's own in the KV cache. It is active only while erasing; the backbone that generates stays unchanged.
Method: KVEraser (arXiv 2606.17034). This adapter was trained with `kveraser train`; it is not the authors'.

```python
import kveraser as kv

model, tokenizer = kv.load_backbone("...")  # the backbone it was trained for
eraser = kv.KVEraser.from_pretrained("this folder", model)
context = kv.ErasableContext(model, tokenizer, eraser)
```

## Training

Stage `{stage}`, step {step}, seed {seed}. Self-distillation from full recomputation on: {tasks}; contexts of
{least} to {most} tokens; surrounding text: {text}.

| | asked after the erase | question cached |
| --- | --- | --- |
| validation KL to full recomputation, nats per answer token | {after} | {cached} |

Validation is on templates, names, values and passages that training does not use.

## Limits

It is approximate: what the span left in later tokens is steered against, not removed. When nothing of a span may remain,
repair or recompute exactly (`context.repair()`, `context.purge(receipt)`). It fits its own backbone's weights only.

## Configuration

```yaml
{config}```
"""


def write_card(folder: Path, notes: dict[str, Any]) -> None:
    """Write the card into the folder of an eraser."""
    config, stage = notes["training"], notes["stage"]
    least, most = config[stage]["tokens"]
    text = _TEXT.format(
        stage=stage, step=notes["step"], seed=config["seed"], tasks=", ".join(config[stage]["tasks"]), least=least,
        most=most, text=config["text"] or "documentation of Python's standard library",
        after=_kl(notes["validation_kl"]["query_after"]), cached=_kl(notes["validation_kl"]["query_cached"]),
        config=yaml.safe_dump(config, sort_keys=False),
    )  # fmt: skip
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def _kl(value: float | None) -> str:
    return "not asked" if value is None else f"{value:.4f}"
