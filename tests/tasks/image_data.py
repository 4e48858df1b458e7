"""Small data sets of images, and the image task over them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from PIL import Image

from fedkd_flwr.tasks.image_classification import ImageClassification, ImageClassificationOptions

SIDE, NUM_CLASSES, NUM_CLIENTS = 8, 3, 4
NUM_TRAIN, NUM_TEST = 48, 12
SMALL = {"num_channels": [2], "kernel_size": 3, "hidden_size": 4}
NATURAL = {"name": "natural", "column": "site"}


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> dict[str, Any]:
    """An image as a table stores it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def rows(num: int, first: int = 0, side: int = SIDE) -> dict[str, list[Any]]:
    """Distinct grey images; labels and sites take turns."""
    images = [np.random.default_rng(first + i).integers(0, 256, (side, side), np.uint8) for i in range(num)]
    return {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": [i % NUM_CLASSES for i in range(num)],
        "site": [f"site{i // NUM_CLASSES % NUM_CLIENTS}" for i in range(num)],
    }


def write(folder: Path, split: str, data: dict[str, list[Any]], *, named: bool = True) -> None:
    table = Dataset.from_dict(data)
    if isinstance(data["image"][0], dict):
        table = table.cast_column("image", ImageFeature())
    if named:
        table = table.cast_column("label", ClassLabel(names=["red", "green", "blue"]))
    folder.mkdir(exist_ok=True)
    table.to_parquet(folder / f"{split}.parquet")


def write_both(folder: Path) -> Path:
    """Both splits; the folder."""
    write(folder, "train", rows(NUM_TRAIN))
    write(folder, "test", rows(NUM_TEST, first=NUM_TRAIN))
    return folder


def options(folder: Path, **changes: object) -> ImageClassificationOptions:
    chosen = {"data": str(folder), "channels": 1, "teacher": SMALL, "student": SMALL, **changes}
    return ImageClassificationOptions.model_validate(chosen)


def columns(folder: Path, **names: object) -> dict[str, object]:
    """The data section that names columns."""
    return {"source": str(folder), "columns": names}


def build(folder: Path, num_clients: int = NUM_CLIENTS, seed: int = 0, **changes: object) -> ImageClassification:
    return options(folder, **changes).build(num_clients, seed)


def refusal(folder: Path, num_clients: int = NUM_CLIENTS, **changes: object) -> str:
    """Why this can't be built, or why a client of it can't be had."""
    with pytest.raises(ValueError) as caught:
        task = build(folder, num_clients, **changes)
        for client in range(num_clients):
            task.client_data(client)
    assert "\n" not in str(caught.value)
    return str(caught.value)
