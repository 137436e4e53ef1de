"""The two splits every source of data is dealt to."""

from typing import Literal

Split = Literal["train", "eval"]
