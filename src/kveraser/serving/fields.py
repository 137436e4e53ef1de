"""Fields that the bodies of several APIs have in common.

Knows: types and limits. Does not know in which bodies they are.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=1 << 20)]
"""A number of tokens."""
Text = Annotated[str, Field(max_length=1 << 24)]
"""A text to be read."""
Role = Literal["system", "developer", "user", "assistant", "tool"]
"""Who a message is of."""


def template_role(role: Role) -> str:
    """A role as chat templates know it: `developer` is OpenAI's newer name for `system`."""
    return "system" if role == "developer" else role


class Body(BaseModel):
    """A body, or a part of one, in which every field must be known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
