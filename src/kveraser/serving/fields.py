"""Fields that the bodies of several APIs have in common.

Knows: types and limits. Does not know in which bodies they are.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1, le=1 << 20)]
"""A number of tokens."""
Text = Annotated[str, Field(max_length=1 << 24)]
"""A text to be read."""
