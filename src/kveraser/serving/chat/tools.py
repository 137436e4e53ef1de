"""What may be called, and whether a call is right: its name is a tool's, its arguments are what the tool's schema asks for.

Knows: JSON schemas. Does not know how calls are written or told. No schema is ever fetched from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jsonschema_rs

from kveraser.errors import BadCallError, SchemaError
from kveraser.serving.chat.schemas import expanded

ChoiceMode = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for.

    Attributes:
        parameters: the JSON schema of its arguments.
        shown: all of it, as the template gets it (OpenAI's form, as most templates expect).
    """

    name: str
    parameters: Mapping[str, Any]
    shown: Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called: as the model likes, not at all, at least one, or the one that is named.

    Attributes:
        parallel: whether one reply may have several calls; else it ends with its first.
    """

    mode: ChoiceMode = "auto"
    name: str | None = None
    parallel: bool = True


AS_IT_LIKES = ToolChoice()
"""The model calls what it likes."""


@dataclass(frozen=True)
class _Arguments:
    """What arguments have to be. Where a schema is within itself, telling what is wrong with them takes time that is exponential in how
    deeply they are nested, and finding that something is does not: then only that is told."""

    validator: Any
    recursive: bool

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> _Arguments:
        recursive = expanded(schema).recursive
        return cls(jsonschema_rs.validator_for(dict(schema), offline=True), recursive)

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise `BadCallError` unless the schema allows these arguments."""
        if self.validator.is_valid(arguments):
            return
        place, told = "", ""
        try:
            if not self.recursive:
                self.validator.validate(arguments)
        except jsonschema_rs.ValidationError as wrong:
            place, told = "".join(f"[{part!r}]" for part in wrong.instance_path), f": {wrong.message}"
        raise BadCallError(f"the arguments{place} do not fit the tool's schema{told}")


@dataclass(frozen=True)
class Toolset:
    """The tools of one request."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = AS_IT_LIKES
    _arguments: dict[str, _Arguments] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, tools: Sequence[Tool], choice: ToolChoice) -> Toolset:
        """The tools, once their schemas are known to be some.

        Raises:
            SchemaError: the parameters of a tool are no schema, or one that takes too long.
            BadCallError: the choice names no tool, or there is none to choose from.
        """
        checks = {}
        for index, tool in enumerate(tools):
            try:
                checks[tool.name] = _Arguments.of(tool.parameters)
            except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError, RecursionError) as error:
                raise SchemaError(index, str(error).split("\n", 1)[0]) from None
        if choice.name is not None and choice.name not in checks:
            raise BadCallError(f"there is no tool {choice.name!r} to choose")
        if choice.mode == "required" and not tools:
            raise BadCallError("a call is asked for, and there are no tools")
        return cls(tuple(tools), choice, checks)

    @property
    def forced(self) -> bool:
        """Whether a reply has to begin with a call."""
        return self.choice.mode == "required"

    @property
    def only(self) -> str | None:
        """The name of the tool that has to be called, where that leaves no choice."""
        return self.choice.name or (self.tools[0].name if self.forced and len(self.tools) == 1 else None)

    def has(self, name: str) -> bool:
        """Whether there is a tool of that name."""
        return name in self._arguments

    def check(self, name: str, arguments: dict[str, Any]) -> str:
        """The arguments as JSON, once they are known to be right.

        Raises:
            BadCallError: there is no such tool, it was not the one to call, or its schema does not allow these arguments.
        """
        if not self.has(name):
            raise BadCallError("there is no tool of that name")
        if self.choice.name not in (None, name):
            raise BadCallError(f"the tool to call is {self.choice.name!r}")
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()
            self._arguments[name].check(arguments)
        except BadCallError:
            raise
        except (ValueError, RecursionError):  # NaN, half a character, nested too deeply
            raise BadCallError("the arguments are not what JSON can carry") from None
        return text


NO_TOOLS = Toolset()
"""There is nothing to call."""
