"""What a request of any API may say to kveraser itself.

Knows: policies. Does not know about the APIs.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kveraser.serving.contexts.reuse import Policy
from kveraser.serving.fields import Body

StopText = Annotated[str, Field(min_length=1, max_length=256)]
"""A text that a reply ends before."""
ForgetText = Annotated[str, Field(min_length=1, max_length=1 << 20)]
"""A text to be forgotten."""


class Options(Body):
    """The field `kveraser` of a request (`extra_body` of the clients)."""

    policy: Policy | None = Field(
        None, description="How edits of a cached conversation are done; default: the server's."
    )
    max_residual: float | None = Field(
        None,
        ge=0,
        le=1,
        description="What edits may leave behind under `auto`; more is recomputed at once. Default: the server's.",
    )
    must_forget: Annotated[list[ForgetText], Field(max_length=64)] | None = Field(
        None, description="Texts of which nothing may be left in what is cached for this key."
    )
