"""The tools that a request offers, or the reply that says what is wrong with them: the same for all APIs.

Knows: tools, where an API has their schemas. Does not know about messages, or how calls are written.
"""

from __future__ import annotations

from collections.abc import Sequence

from kveraser.errors import ApiError, BadCallError, SchemaError
from kveraser.serving.chat.tools import Tool, ToolChoice, Toolset


def offered(tools: Sequence[Tool], choice: ToolChoice, schema: str) -> Toolset:
    """The tools of a request.

    Args:
        schema: where in a tool of this API its schema is, for the error.

    Raises:
        ApiError: two of the same name, a schema that is none, a choice of a tool that there is not.
    """
    if len({tool.name for tool in tools}) < len(tools):
        raise ApiError(400, "tools: two have the same name", param="tools")
    try:
        return Toolset.of(tools, choice)
    except SchemaError as error:
        place = f"tools[{error.index}].{schema}"
        raise ApiError(400, f"{place}: {error}", param=place) from None
    except BadCallError as error:
        raise ApiError(400, f"tool_choice: {error}", param="tool_choice") from None
