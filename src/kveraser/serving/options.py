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


class Options(Body):
    """The field `kveraser` of a request (`extra_body` of the clients)."""

    policy: Policy | None = Field(
        None, description="How edits of a cached conversation are done; default: the server's."
    )
