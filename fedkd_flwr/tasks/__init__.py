"""What is learned: one file for each task, one line for each here."""

from fedkd_flwr.tasks.base import TaskOptions
from fedkd_flwr.tasks.cartpole import CartPoleOptions
from fedkd_flwr.tasks.digits import DigitsOptions
from fedkd_flwr.tasks.image_classification import ImageClassificationOptions
from fedkd_flwr.tasks.news_recommendation import NewsRecommendationOptions
from fedkd_flwr.tasks.text_classification import TextClassificationOptions
from fedkd_flwr.tasks.token_classification import TokenClassificationOptions

TASKS: dict[str, type[TaskOptions]] = {
    "cartpole": CartPoleOptions,
    "digits": DigitsOptions,
    "image_classification": ImageClassificationOptions,
    "news_recommendation": NewsRecommendationOptions,
    "text_classification": TextClassificationOptions,
    "token_classification": TokenClassificationOptions,
}

__all__ = ["TASKS", "TaskOptions"]
