"""The registry of erasing methods.

To add one: write `methods/your_method.py` with a frozen dataclass below `EraseMethod`, and add it to `_METHODS`. Every
test, table and plot then covers it. Other packages register theirs as entry points of the group `kveraser.methods`.

Each method's file knows the edit, the verbs of its backend, and where its idea comes from. It does not know about text, ledgers,
undoing, or what other methods do; its receipt is written around it.
"""

from __future__ import annotations

import difflib

from kveraser.eraser import KVEraser
from kveraser.errors import OptionError
from kveraser.extensions import with_extensions
from kveraser.methods.attention_guided_repair import AttentionGuidedRepair
from kveraser.methods.auto import Auto
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.methods.delete_and_shift import DeleteAndShift
from kveraser.methods.full_recompute import FullRecompute
from kveraser.methods.local_suffix_repair import LocalSuffixRepair
from kveraser.methods.no_erase import NoErase
from kveraser.methods.putting_back import put_back
from kveraser.methods.receipt import EraseReceipt
from kveraser.methods.selective_recompute import SelectiveRecompute
from kveraser.methods.spec import method_from_text, method_label, text_options, write_value
from kveraser.methods.steering import Steering
from kveraser.methods.transaction import transact
from kveraser.methods.undo import Undo

GROUP = "kveraser.methods"
"""Of the entry points by which other packages add methods."""
_METHODS: tuple[type[EraseMethod], ...] = (
    NoErase,
    FullRecompute,
    DeleteAndShift,
    LocalSuffixRepair,
    SelectiveRecompute,
    AttentionGuidedRepair,
    Steering,
    Auto,
)


def methods() -> dict[str, type[EraseMethod]]:
    """Every erasing method by name, in the order of the tables, those of other packages last."""
    return with_extensions(GROUP, EraseMethod, _METHODS)


def as_method(method: str | EraseMethod | KVEraser) -> EraseMethod:
    """The method meant by a name, `name:option=value,...`, a method, or an eraser (steering with it).

    Raises:
        OptionError: an unknown name or option, or an impossible value.
    """
    if isinstance(method, EraseMethod):
        return method
    if isinstance(method, KVEraser):
        return Steering(method)
    name, colon, options = str(method).partition(":")
    if name in methods():
        return method_from_text(methods()[name], options) if colon else methods()[name]()
    close = difflib.get_close_matches(name, methods(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise OptionError(f"there is no erasing method {name!r}{hint} there are: {', '.join(methods())}")


__all__ = [
    "AttentionGuidedRepair",
    "Auto",
    "DeleteAndShift",
    "Edit",
    "EraseMethod",
    "EraseReceipt",
    "FullRecompute",
    "LocalSuffixRepair",
    "NoErase",
    "Outcome",
    "Plan",
    "SelectiveRecompute",
    "Steering",
    "Undo",
    "as_method",
    "method_label",
    "methods",
    "put_back",
    "text_options",
    "transact",
    "write_value",
]
