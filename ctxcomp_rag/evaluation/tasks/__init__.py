"""The tasks of `ctxcomp eval`, by name."""

from difflib import get_close_matches

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.base import Asked, Task, TaskData
from ctxcomp_rag.evaluation.tasks.home import Home
from ctxcomp_rag.evaluation.tasks.hotpotqa import HotpotQA
from ctxcomp_rag.evaluation.tasks.jsonl import JsonLines
from ctxcomp_rag.evaluation.tasks.squad import Squad

TASKS: dict[str, Task] = {task.name: task for task in (Home(), Squad(), HotpotQA(), JsonLines())}


def task_named(name: str) -> Task:
    """Raises InputError that offers the nearest names."""
    if name not in TASKS:
        near = get_close_matches(name, TASKS, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(TASKS)}"
        raise InputError(f"there is no task {name!r}; {hint}")
    return TASKS[name]


__all__ = ["TASKS", "Asked", "Task", "TaskData", "task_named"]
