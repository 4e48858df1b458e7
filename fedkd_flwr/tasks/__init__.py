"""What is learned: one file for each task, one line for each here."""

from fedkd_flwr.tasks.base import TaskOptions
from fedkd_flwr.tasks.digits import DigitsOptions
from fedkd_flwr.tasks.image_classification import ImageClassificationOptions

TASKS: dict[str, type[TaskOptions]] = {
    "digits": DigitsOptions,
    "image_classification": ImageClassificationOptions,
}

__all__ = ["TASKS", "TaskOptions"]
