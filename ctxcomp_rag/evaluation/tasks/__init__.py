"""The tasks of `ctxcomp eval`, by name."""

from difflib import get_close_matches

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.tasks.base import Ask, Asked, Task, TaskData
from ctxcomp_rag.evaluation.tasks.gsm8k import GSM8K
from ctxcomp_rag.evaluation.tasks.home import Home
from ctxcomp_rag.evaluation.tasks.hotpotqa import HotpotQA
from ctxcomp_rag.evaluation.tasks.jsonl import JsonLines
from ctxcomp_rag.evaluation.tasks.needle import Needle
from ctxcomp_rag.evaluation.tasks.nq import NaturalQuestions
from ctxcomp_rag.evaluation.tasks.squad import Squad
from ctxcomp_rag.evaluation.tasks.sst2 import SST2
from ctxcomp_rag.evaluation.tasks.summarisation import Summarisation
from ctxcomp_rag.evaluation.tasks.texts import Perplexity, Reconstruction
from ctxcomp_rag.evaluation.tasks.triviaqa import TriviaQA
from ctxcomp_rag.evaluation.tasks.wsc import WSC

TASKS: dict[str, Task] = {task.name: task for task in (
    Home(), Squad(), HotpotQA(), JsonLines(), TriviaQA(), NaturalQuestions(), GSM8K(), SST2(), WSC(), Needle(),
    Reconstruction(), Summarisation(), Perplexity())}


def task_named(name: str) -> Task:
    """Raises InputError that offers the nearest names."""
    if name not in TASKS:
        near = get_close_matches(name, TASKS, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(TASKS)}"
        raise InputError(f"there is no task {name!r}; {hint}")
    return TASKS[name]


__all__ = ["TASKS", "Ask", "Asked", "Task", "TaskData", "task_named"]
