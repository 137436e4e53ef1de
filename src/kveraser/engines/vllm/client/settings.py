"""How a session erases on its server: what was asked for, and what the server can do.

Knows: what a server says of itself, the options of an erase. Does not know how anything is sent, or about contexts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from kveraser.cache import Window
from kveraser.engines.vllm.protocol import reading
from kveraser.eraser.config import CHOICES, Choose
from kveraser.errors import EngineError, OptionError
from kveraser.methods.choosing import Wish

NEUTRAL = "neutral"
"""What a session calls it to have no eraser."""
_ADAPTER = "eraser"


@dataclass(frozen=True)
class Settings:
    """What has been settled; as the arguments of `VLLMSession`."""

    eraser: str
    window: Window | None
    repair: int | None
    choose: Choose
    close_gaps: bool

    @classmethod
    def of(
        cls, about: dict[str, Any], adapters: Collection[str], *, eraser: str | None, window: Window | str | None, repair: int | None,
        choose: Choose | None, block: int, coverage: float | None, close_gaps: bool | None,
    ) -> Settings:  # fmt: skip
        """What a session does that was asked for something (None: whatever is best).

        Args:
            about: how the server is set up.
            adapters: what it offers.

        Raises:
            EngineError: the server has nothing to erase with.
            OptionError: an impossible value, or something that this server cannot do.
        """
        tells = "choose" in about  # else nobody there can tell readers, or hide a span
        if eraser is None:
            eraser = _ADAPTER if _ADAPTER in adapters and (about.get("preferred") or not tells) else NEUTRAL
        if eraser == NEUTRAL and not tells:
            raise EngineError(
                "the server has neither the adapter of an eraser nor probes of its model, so nothing can be erased; start it "
                "with --lora-modules, or with an eraser's folder that holds readers.safetensors"
            )
        default: Choose = about["choose"] if tells and eraser != NEUTRAL else "readers" if tells else "next"
        choose = default if choose is None else choose
        if choose not in CHOICES or (choose == "readers") < (eraser == NEUTRAL):
            raise OptionError(
                f"choose={choose!r} is none of {', '.join(CHOICES)}, or no choice with the {eraser} eraser"
            )
        if choose == "readers" and not tells:
            raise OptionError("choose='readers' cannot be done by this server, which has no probes; use choose='next'")
        with reading("the server"):
            trained = None if about["window"] is None else (about["window"][0], about["window"][1])
            own = about["repair"] if choose == "next" else None if eraser == NEUTRAL else about["readers"]
        repair = own if repair is None else repair
        Wish(repair, coverage, min(block, repair or block), None)
        return cls(
            eraser=eraser,
            window=trained if window is None else _checked_window(window),
            repair=repair,
            choose=choose,
            close_gaps=about.get("close_gaps", False) if close_gaps is None else close_gaps,
        )


def _checked_window(window: Window | str) -> Window | None:
    if window == "full":
        return None
    if isinstance(window, str) or len(window) != 2 or min(window) < 0:
        raise OptionError(f"window={window!r} must be two counts (sink, local) of at least 0, or 'full'")
    return window
