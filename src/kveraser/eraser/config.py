"""What is stored beside an adapter: how the eraser attends, and which backbone it was made for.

Knows: `kveraser.json`. Does not know about LoRA layers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from kveraser.cache import Window
from kveraser.errors import EraserMismatchError
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers import LEAST_READERS

FILE_NAME = "kveraser.json"
FORMAT = 5
Choose = Literal["readers", "next"]
"""Which tokens behind a span are recomputed: those that have read it, or those that come next."""
CHOICES: tuple[Choose, ...] = get_args(Choose)
ActsOn = Literal["spans", "readers"]
"""Where the LoRA runs: on the erased tokens, whose slots it steers, or on the readers that are recomputed."""
ACTS_ON: tuple[ActsOn, ...] = get_args(ActsOn)
Values = Literal["own", "learned"]
"""What the values of steering states are: the model's, changed by the LoRA, or what the LoRA makes alone."""
VALUES: tuple[Values, ...] = get_args(Values)
_PLAIN = {"acts_on": ("spans", 3), "values": ("own", 4)}
"""What an eraser is that adds a LoRA to the erased tokens and does nothing else, and the format that can say otherwise."""
Known = TypeVar("Known")
_ENGINES_MOST = 32


@dataclass(frozen=True)
class EraserConfig:
    """`kveraser.json`.

    Attributes:
        fingerprint: the backbone the eraser was made for.
        window: `(sink, local)` slots the eraser attends to besides the span; None for the whole prefix.
        repair: live tokens behind the span to recompute with the backbone after steering; None: by the span's length
            (`readers.how_many`), as neutral erasers do; only then the file has format 5.
        choose: which ones. Format 1 had no choice: the next ones.
        acts_on: where the LoRA runs. On "readers" it can make up there for what the other tokens have read, and the span's
            slots get neutral states; only then the file has format 3.
        values: of the steering states. "learned" ones say nothing of the span before training, even where its slots are attended
            to, as they must be to learn anything; only then the file has format 4.
        preferred: whether `kveraser` takes this eraser by itself rather than the neutral one: only where it was better
            on held-out examples.
        notes: anything else worth keeping (how it was trained).
    """

    fingerprint: Fingerprint
    window: Window | None = None
    repair: int | None = 0
    choose: Choose = "readers"
    acts_on: ActsOn = "spans"
    values: Values = "own"
    preferred: bool = True
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def repair_next(self) -> int:
        """How many of the next tokens to recompute where readers are not asked for (trained erasers inside engines), however long
        the span is."""
        most = LEAST_READERS if self.repair is None else self.repair
        return most if self.choose == "next" else min(most, _ENGINES_MOST)

    def check_plain(self, source: Path) -> None:
        """Raise `EraserMismatchError` unless all that it asks for is a LoRA beside the plain layers, on the erased tokens.

        Args:
            source: where it was read from, for the message.
        """
        for key, (plain, _) in _PLAIN.items():
            found = getattr(self, key)
            if found != plain:
                raise EraserMismatchError(
                    f"the eraser in {source} has {key}={found}, which works in transformers only: engines add a LoRA to the erased "
                    f"tokens, and nothing else; use one that was trained with eraser.{key}={plain}, or a neutral one"
                )

    def write(self, folder: Path) -> None:
        """Write `kveraser.json` into `folder`."""
        data, number = asdict(self), 2
        for key, (plain, since) in _PLAIN.items():
            if data[key] == plain:  # a version that does not know it need not be told
                del data[key]
            else:
                number = since
        if self.repair is None:
            number = 5
        text = json.dumps({"format": number, **data}, indent=2, sort_keys=True)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> EraserConfig:
        """Read a `kveraser.json`.

        Raises:
            EraserMismatchError: not a readable file of this format.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["format"] > FORMAT:
                raise EraserMismatchError(
                    f"{file} has format {data['format']}, this version reads {FORMAT}; update kveraser"
                )
            window, repair = data.get("window"), data.get("repair", 0)
            return cls(
                fingerprint=Fingerprint(**data["fingerprint"]),
                window=None if window is None else (int(window[0]), int(window[1])),
                repair=None if repair is None else int(repair),
                choose=one_of(data["choose"], CHOICES, "choose") if data["format"] > 1 else "next",
                acts_on=one_of(data.get("acts_on", "spans"), ACTS_ON, "acts_on"),
                values=one_of(data.get("values", "own"), VALUES, "values"),
                preferred=bool(data.get("preferred", True)),
                notes=dict(data.get("notes", {})),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, EraserMismatchError):
                raise
            raise EraserMismatchError(f"{file} cannot be read as an eraser's configuration: {error!r}") from error


def one_of(value: object, known: tuple[Known, ...], what: str) -> Known:
    """The value, if it is a known one; else a ValueError."""
    for each in known:
        if value == each:
            return each
    raise ValueError(f"{what}={value!r} is none of {', '.join(map(str, known))}")
