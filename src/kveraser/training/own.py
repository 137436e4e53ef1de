"""What of an output folder is a run's own: the only things in it that are ever replaced or removed.

Knows: the names of what training writes, and what tells it from files of the same name. Does not know what is in the folders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from kveraser.eraser.adapter_files import CONFIG, WEIGHTS
from kveraser.eraser.config import FILE_NAME as ERASER
from kveraser.errors import TrainingError
from kveraser.files.writing import meant_by
from kveraser.readers import FILE_NAME as READERS
from kveraser.training.card import FILE_NAME as CARD
from kveraser.training.checkpoint import FILE_NAME as CHECKPOINT
from kveraser.training.config import STAGES, StageName

BEST, LOG, BOARD, RESULT, OPTIONS = "best", "train.jsonl", "tensorboard", "eraser", "config.yaml"
_ERASER = (ERASER, CONFIG, WEIGHTS, READERS, CARD)
_STAGE = (CHECKPOINT, BEST, LOG, BOARD, f".{BEST}.new", f".{BEST}.old")
_EVENTS = "events.out.tfevents."
_LINE = b'{"step": '


def check_own(output: Path, stages: Sequence[StageName], *, fresh: bool) -> None:
    """Whether all that a run would replace in its folder was written by one.

    Args:
        fresh: whether the folders of these stages are to be removed.

    Raises:
        TrainingError: something was not; it is named.
    """
    _check_file(output / OPTIONS, _is_configuration, "the configuration of a run")
    check_eraser(output / RESULT)
    for name in stages:
        check_eraser(output / name / BEST)
        _check_file(output / name / LOG, _is_log, "the log of a run")
        if fresh:
            _check_stage(output / name)


def check_eraser(folder: Path) -> None:
    """Raise `TrainingError` unless a folder is an eraser with nothing beside it, empty, or not there."""
    _check_names(folder, lambda name: name in _ERASER, "replaced")
    if _names(folder) and not (folder / ERASER).is_file():
        raise _foreign(f"{folder} holds no {ERASER}, so it is not an eraser", "replaced")


def _check_stage(folder: Path) -> None:
    _check_names(folder, lambda name: name in _STAGE, "removed")
    _check_names(folder / BOARD, lambda name: name.startswith(_EVENTS), "removed")
    names = _names(folder)
    if not {BEST, LOG} & names and {CHECKPOINT, BOARD} & names:
        raise _foreign(f"{folder} holds neither {BEST}/ nor {LOG}, so it is not a stage's", "removed")


def _check_names(folder: Path, known: Callable[[str], bool], fate: str) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise _foreign(f"{folder} is no folder", fate)
    others = sorted(name for name in _names(folder) if not known(meant_by(name) or name))
    if others:
        raise _foreign(f"{folder} holds {_listed(others)}, which training did not write", fate)


def _check_file(file: Path, own: Callable[[bytes], bool], what: str) -> None:
    if not file.exists():
        return
    if not file.is_file() or not own(file.read_bytes()):
        raise _foreign(f"{file} is not {what}", "overwritten")


def _is_configuration(data: bytes) -> bool:
    with suppress(yaml.YAMLError, UnicodeDecodeError):
        found = yaml.safe_load(data.decode())
        return isinstance(found, dict) and found.keys() >= {"eraser", *STAGES}
    return False


def _is_log(data: bytes) -> bool:
    """Also of one whose first line was cut off."""
    return _LINE.startswith(data[: len(_LINE)])


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _listed(names: Collection[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def _foreign(what: str, fate: str) -> TrainingError:
    return TrainingError(f"{what}, and would be {fate}; move it away, or give another output folder")
