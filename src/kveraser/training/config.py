"""What a training run depends on: dataclasses, read from YAML, changed by `stage.key=value`.

Knows: names, types and bounds of the options. Does not know about models or loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from kveraser.cache import Window
from kveraser.eraser.config import ActsOn, Values
from kveraser.errors import OptionError
from kveraser.files import write_atomically
from kveraser.readers import LEAST_READERS
from kveraser.tasks import as_task, tasks
from kveraser.training.lessons import Kind

StageName = Literal["pretrain", "finetune"]
STAGES: tuple[StageName, ...] = get_args(StageName)
_PRETRAINING = ("span-neighbor",)
_STRICT = ConfigDict(extra="forbid")
_WEIGHTS: dict[Kind, float] = {
    "query_after": 1.0, "query_cached": 1.0, "other": 0.5, "continuation": 0.5, "cue": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class EraserOptions:
    """The eraser to be made.

    Attributes:
        rank, alpha: of the LoRA.
        window: `(sink, local)` slots that a pass attends to before its tokens; None for the whole prefix.
        repair: readers of a span that erasing recomputes by default, and validation with it.
        acts_on: where the eraser runs: on "spans", whose slots it steers, or on their "readers", where it makes up for what
            the other tokens have read (the spans' slots are then neutral).
        values: of the spans' states: the model's "own", changed by the LoRA, or "learned" ones, which the LoRA makes alone. These
            say nothing of the span at the start, so it may be less hidden (`hidden=3`) and learns faster.
        hidden: nats by which attention to the steering states is lower at the start (see `neutral`); 0 starts from the
            span's own states, as a fresh LoRA does.
    """

    __pydantic_config__: ClassVar = _STRICT

    rank: int = 16
    alpha: int = 32
    window: Window | None = (4, 512)
    repair: int = LEAST_READERS
    acts_on: ActsOn = "spans"
    values: Values = "own"
    hidden: float = 8.0

    def __post_init__(self) -> None:
        _require(self.rank >= 1 and self.alpha >= 1, f"rank={self.rank} and alpha={self.alpha} must be at least 1")
        _require(self.repair >= 0, f"repair={self.repair} must not be negative")
        _require(0 <= self.hidden < math.inf, f"hidden={self.hidden} must not be negative, and finite")
        _require(self.acts_on == "spans" or self.repair > 0, "acts_on=readers needs readers: repair=0 recomputes none")
        _require(
            self.acts_on == "spans" or self.values == "own",
            "acts_on=readers steers no spans: values=learned is for these",
        )
        window = self.window is None or (len(self.window) == 2 and min(self.window) >= 0)
        _require(window, f"window={self.window} must be null or two counts [sink, local]")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        tasks: names of data tasks, drawn with equal chance.
        steps: optimiser steps.
        contexts: contexts per step, over all processes; each holds several spans.
        epochs: how often each context is learnt from; their number is steps x contexts / epochs.
        tokens: length of a context, `(least, most)`, on a logarithmic scale.
        spacing: tokens of context per span, roughly.
        spans: spans of a context at most.
        together: chance that the spans of a context are erased all at once (one teacher serves them all).
        repair: readers of each span that are recomputed in training, one of the numbers for each context in turn; empty
            takes the eraser's own.
        weights: of the tokens that are judged: the span's question asked after the erase or before it, another
            span's question, the continuation of the text, the span-neighbor cue. Zero turns a term off.
        chat: write the contexts and questions by the model's chat template (see `tasks/chat.py`).
        cross_entropy: weight of the gold answers' cross-entropy beside KL.
        learning_rate, weight_decay, warmup: of AdamW; the rate rises for `warmup` steps, then falls to a tenth.
        clip: largest norm of the gradient.
        average: decay per step of the running mean of the weights, which is what is judged and saved.
        validate_every: steps between validations; each is followed by a checkpoint.
        validation_contexts: held-out contexts of each validation.
        checkpoint_every: steps between further checkpoints.
        patience: validations without improvement after which the stage ends; 0 for never.
    """

    __pydantic_config__: ClassVar = _STRICT

    tasks: tuple[str, ...] = ()
    steps: int = 300
    contexts: int = 6
    epochs: int = 1
    tokens: tuple[int, int] = (64, 448)
    spacing: int = 150
    spans: int = 8
    together: float = 0.5
    repair: tuple[int, ...] = ()
    weights: Mapping[Kind, float] = field(default_factory=lambda: dict(_WEIGHTS))
    chat: bool = False
    cross_entropy: float = 0.0
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup: int = 10
    clip: float = 1.0
    average: float = 0.98
    validate_every: int = 50
    validation_contexts: int = 16
    checkpoint_every: int = 20
    patience: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "contexts",
            "epochs",
            "spacing",
            "spans",
            "validate_every",
            "validation_contexts",
            "checkpoint_every",
        ):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("cross_entropy", "weight_decay", "warmup", "patience", "repair", "weights"):
            value: Any = getattr(self, name)
            several = name in ("repair", "weights")
            values = value.values() if isinstance(value, Mapping) else value if several else (value,)
            fine = all(0 <= each < math.inf for each in values)
            _require(fine, f"{name}={value} must not be negative, and finite")
        least, most = self.tokens
        _require(16 <= least <= most, f"tokens={self.tokens} must be two lengths, 16 <= least <= most")
        _require(0 <= self.together <= 1, f"together={self.together} must be a share from 0 to 1")
        _require(0 <= self.average < 1, f"average={self.average} must be at least 0 and below 1")
        asked = [self.weights.get(kind, 0) for kind in ("query_after", "query_cached")]
        _require(
            any(asked),
            f"weights={dict(self.weights)}: query_after or query_cached must be above 0, by which the best eraser is chosen",
        )
        _require(0 < self.learning_rate < math.inf, f"learning_rate={self.learning_rate} must be above 0, and finite")
        _require(self.clip > 0, f"clip={self.clip} must be above 0")
        for name in self.tasks:
            _require(
                as_task(name).trained, f"the task {name} replaces its spans; an eraser learns from those that erase"
            )
            _require(
                "=" not in name, f"the task {name} has a file of its own, which is for evaluation only; leave it out"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        text: a file, a folder or `hf:DATASET[@CONFIGURATION][:SPLIT[:COLUMN]]` to surround the spans with; None for the documentation
            of Python's standard library.
        seed: of the LoRA's start and of all data.
    """

    __pydantic_config__: ClassVar = _STRICT

    eraser: EraserOptions = field(default_factory=EraserOptions)
    pretrain: Stage = field(default_factory=lambda: Stage(tasks=_PRETRAINING, steps=50))
    finetune: Stage = field(
        default_factory=lambda: Stage(tasks=tuple(name for name, task in tasks().items() if task.trained))
    )
    text: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name in STAGES if self.eraser.acts_on == "readers" else ():
            repair = self.stage(name).repair
            _require(0 not in repair, f"acts_on=readers needs readers: {name}.repair={list(repair)} has a 0")

    def stage(self, name: StageName) -> Stage:
        """One of the stages by name."""
        found: Stage = getattr(self, name)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as YAML and JSON hold them."""
        plain: dict[str, Any] = TypeAdapter(TrainConfig).dump_python(self, mode="json")
        return plain

    def write(self, file: Path) -> None:
        """Write it as YAML, whole or not at all."""
        write_atomically(file, yaml.safe_dump(self.as_dict(), sort_keys=False).encode())


def _tiny() -> TrainConfig:
    small: dict[str, Any] = {
        "tokens": (48, 160),
        "spacing": 96,
        "spans": 2,
        "together": 0.0,
        "learning_rate": 1e-3,
        "warmup": 3,
        "average": 0.8,
    }
    return TrainConfig(
        EraserOptions(rank=8, alpha=16, window=(4, 512), repair=0),
        Stage(_PRETRAINING, steps=2, contexts=2, validate_every=2, validation_contexts=2, **small),
        Stage(("needle", "preference"), steps=4, contexts=2, validate_every=4, validation_contexts=2, **small),
    )


def _gpu() -> TrainConfig:
    base = TrainConfig()
    big: dict[str, Any] = {"contexts": 32, "tokens": (128, 8192), "spacing": 384, "spans": 16, "patience": 5}
    return replace(
        base, pretrain=replace(base.pretrain, steps=1000, **big), finetune=replace(base.finetune, steps=3000, **big)
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"cpu": TrainConfig, "tiny": _tiny, "gpu": _gpu}
"""Configurations to start from: an hour or two on a CPU, a minute or two on any CPU, a GPU or several."""


def read_config(
    file: Path | None = None, preset: str = "cpu", changes: Iterable[str] = (), *, text: str | None = None
) -> TrainConfig:
    """A preset, changed by a YAML file, changed by `key=value` such as `finetune.steps=800` or `eraser.window=[4,64]`.

    Args:
        text: in place of the configuration's.

    Raises:
        OptionError: no such preset, an unreadable file, an unknown key, or a value that cannot be.
    """
    if preset not in PRESETS:
        raise OptionError(f"there is no preset {preset!r}; there are: {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    if file is not None:
        try:
            entries = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise OptionError(f"cannot read the configuration {file}: {error}") from error
        config = _changed(config, {} if entries is None else entries, str(file))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise OptionError(f"{change!r} is not of the form key=value, such as finetune.steps=800")
        try:
            entry: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"the value of {change!r} cannot be read: {error}") from error
        for part in reversed(key.split(".")):
            entry = {part: entry}
        config = _changed(config, entry, change)
    return config if text is None else replace(config, text=text)


def _merged(old: Any, new: Any, source: str) -> Any:
    """Nested mappings laid over each other."""
    if not isinstance(old, Mapping):
        return new
    if not isinstance(new, Mapping):
        raise OptionError(f"{source}: expected the keys {', '.join(old)}; found {new!r}")
    return {**old, **{key: _merged(old.get(key), value, source) for key, value in new.items()}}


def _changed(config: TrainConfig, entries: Any, source: str) -> TrainConfig:
    try:
        return TypeAdapter(TrainConfig).validate_python(_merged(asdict(config), entries, source))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        given = "" if isinstance(first["input"], Mapping) else f"={first['input']!r}"
        raise OptionError(f"{source}: {where}{given}: {first['msg'].removeprefix('Value error, ')}") from error


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise OptionError(message)
