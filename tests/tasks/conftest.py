"""What tests of tasks look at, and a cache of its own for what `datasets` reads, without a network."""

from pathlib import Path

import pytest
from torch import Tensor, nn

from fedkd_flwr.core.protocols import Batch, Examples


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache. Both libraries read their environment when they are imported, so their settings are replaced."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def everything(examples: Examples) -> Batch:
    return next(iter(examples.batches(len(examples))))


def images(examples: Examples) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(examples)["pixel_values"]}


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())
