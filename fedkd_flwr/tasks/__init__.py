"""What is learned: one file for each task, one line for each here."""

from fedkd_flwr.tasks.base import TaskOptions
from fedkd_flwr.tasks.digits import DigitsOptions

TASKS: dict[str, type[TaskOptions]] = {
    "digits": DigitsOptions,
}

__all__ = ["TASKS", "TaskOptions"]
