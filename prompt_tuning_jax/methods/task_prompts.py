"""Sets and checks the task names of methods that train one prompt per task."""

import copy
from collections.abc import Iterable

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.settings import Texts, check


def with_tasks(method: Method, tasks: Iterable[str]) -> Method:
    """Returns a copy of the method with the field `tasks` set."""
    named = copy.copy(method)
    object.__setattr__(named, "tasks", tuple(tasks))
    return named


def check_tasks(tasks: Texts) -> None:
    """Raises SettingError unless there are two or more different tasks, and each name can be that of a file."""
    setting = Setting("tasks")
    check("tasks", tasks, Texts)
    if len(tasks) < 2:
        found = f"has one task, {tasks[0]!r}" if tasks else "is empty"
        raise SettingError(setting, f" {found}, expected the tasks of a mixture, two or more: each gets its own prompt")
    for task in tasks:
        if not task or task.startswith(".") or "/" in task:
            raise SettingError(setting, f" has {task!r}, expected a name that a file may have: its prompt is TASK.npy")
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise SettingError(setting, f" has {twice[0]!r} twice, expected each task once")
