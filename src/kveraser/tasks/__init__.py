"""The registry of data tasks.

To add one: write `tasks/your_task.py` with a class below `Task`, and add it to `_TASKS`.
"""

from __future__ import annotations

from kveraser.errors import OptionError
from kveraser.tasks.base import NOT_SAID, EraseExample, Sizes, Task
from kveraser.tasks.filler import Filler, read_passages
from kveraser.tasks.injection import Injection
from kveraser.tasks.needle import Needle
from kveraser.tasks.preference import Preference
from kveraser.tasks.splits import Split
from kveraser.tasks.tool_observation import ToolObservation

_TASKS: tuple[type[Task], ...] = (Needle, ToolObservation, Preference, Injection)


def tasks() -> dict[str, type[Task]]:
    """Every task by name."""
    return {task.name: task for task in _TASKS}


def as_task(name: str) -> Task:
    """The task with that name.

    Raises:
        OptionError: there is none.
    """
    if name not in tasks():
        raise OptionError(f"there is no task {name!r}; there are: {', '.join(tasks())}")
    return tasks()[name]()


__all__ = ["NOT_SAID", "EraseExample", "Filler", "Sizes", "Split", "Task", "as_task", "read_passages", "tasks"]
