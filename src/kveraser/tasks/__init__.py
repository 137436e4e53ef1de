"""The registry of data tasks.

To add one: write `tasks/your_task.py` with a class below `Task`, and add it to `_TASKS`.
Other packages register theirs as entry points of the group `kveraser.tasks`.

Each task's file knows what its texts say and which answer is right. It does not know about models, tokens, methods, or how answers are
judged.
"""

from __future__ import annotations

from pathlib import Path

from kveraser.errors import OptionError
from kveraser.extensions import with_extensions
from kveraser.tasks.agent_trace import AgentTrace
from kveraser.tasks.base import EraseExample, Sizes, Task, Turn, ask
from kveraser.tasks.chat import ChatForm
from kveraser.tasks.coreference import Coreference
from kveraser.tasks.derived import Derived, DerivedDirect
from kveraser.tasks.document_qa import DocumentQA
from kveraser.tasks.filler import Filler
from kveraser.tasks.in_context import InContext
from kveraser.tasks.injection import Injection
from kveraser.tasks.many_needles import MultiKeyNeedle, MultiValueNeedle
from kveraser.tasks.needle import Needle
from kveraser.tasks.preference import Preference
from kveraser.tasks.replaced import Replaced
from kveraser.tasks.sources import read_passages
from kveraser.tasks.span_neighbor import SpanNeighbor
from kveraser.tasks.splits import Split
from kveraser.tasks.tool_observation import ToolObservation
from kveraser.tasks.tool_selection import ToolSelection
from kveraser.tasks.variable_tracking import VariableTracking

GROUP = "kveraser.tasks"
"""Of the entry points by which other packages add tasks."""
_TASKS: tuple[type[Task], ...] = (
    SpanNeighbor,
    Needle,
    ToolObservation,
    Preference,
    Injection,
    InContext,
    Coreference,
    ToolSelection,
    DocumentQA,
    Derived,
    DerivedDirect,
    VariableTracking,
    MultiKeyNeedle,
    MultiValueNeedle,
    AgentTrace,
    Replaced,
)


def tasks() -> dict[str, type[Task]]:
    """Every task by name, those of other packages last."""
    return with_extensions(GROUP, Task, _TASKS)


def as_task(name: str) -> Task:
    """The task with that name; `NAME=FILE` for one that reads a file of its own.

    Raises:
        OptionError: there is none, it takes no file, or the file cannot be read.
    """
    name, _, source = name.partition("=")
    if name not in tasks():
        raise OptionError(f"there is no task {name!r}; there are: {', '.join(tasks())}")
    return tasks()[name](Path(source) if source else None)


__all__ = [
    "ChatForm",
    "EraseExample",
    "Filler",
    "Sizes",
    "Split",
    "Task",
    "Turn",
    "as_task",
    "ask",
    "read_passages",
    "tasks",
]
