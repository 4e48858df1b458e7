"""A small convolutional network: its options, the model, and its directory on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fedkd_flwr.tasks.base import require_finite

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

ImageShape = tuple[int, int, int]  # channels, height, width


class CnnOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A convolutional network: convolution, ReLU and 2x2 maximum for each entry, then two linear layers.

    Attributes:
        num_channels: output channels of each convolution.
        kernel_size: side of every kernel; images are not padded.
        hidden_size: width between the linear layers.
    """

    name: Literal["cnn"] = "cnn"
    num_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field((32, 64), min_length=1)
    kernel_size: int = Field(5, ge=1)
    hidden_size: int = Field(512, ge=1)

    def build(self, shape: ImageShape, num_classes: int) -> "Cnn":
        """The network with random weights."""
        return Cnn(self, shape, num_classes)

    def num_features(self, shape: ImageShape) -> int:
        """Numbers that the convolutions leave of one image.

        Raises:
            ValueError: if they leave none.
        """
        height, width = shape[1:]
        for _ in self.num_channels:
            height, width = (height - self.kernel_size + 1) // 2, (width - self.kernel_size + 1) // 2
            if min(height, width) < 1:
                raise ValueError(
                    f"{len(self.num_channels)} convolutions with kernel_size {self.kernel_size} leave nothing of "
                    f"images of {shape[2]}x{shape[1]} pixels; lower kernel_size, or raise task.image_size"
                )
        return self.num_channels[-1] * height * width


class Cnn(nn.Module):
    """See `CnnOptions`. From images [batch, channels, height, width] to logits [batch, classes]."""

    def __init__(self, options: CnnOptions, shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        self.config = {**options.model_dump(mode="json"), "image_shape": list(shape), "num_classes": num_classes}
        sizes = [shape[0], *options.num_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], options.kernel_size) for i in range(len(sizes) - 1)
        )
        self.hidden = nn.Linear(options.num_features(shape), options.hidden_size)
        self.classifier = nn.Linear(options.hidden_size, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of a batch of images."""
        for convolution in self.convolutions:
            pixel_values = functional.max_pool2d(convolution(pixel_values).relu(), 2)
        logits: Tensor = self.classifier(self.hidden(pixel_values.flatten(1)).relu())
        return logits


def save_cnn(model: Cnn, directory: Path, details: Mapping[str, object]) -> None:
    """Write weights and configuration; `details` go into the configuration for whoever uses the model."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), directory / WEIGHTS_FILE)
    text = json.dumps({**details, "model": model.config}, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_cnn(directory: Path) -> Cnn:
    """The model that `save_cnn` wrote.

    Raises:
        ValueError: if it holds numbers that are not finite.
    """
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["model"]
    shape, num_classes = config.pop("image_shape"), config.pop("num_classes")
    model = CnnOptions.model_validate(config).build(tuple(shape), num_classes)
    model.load_state_dict(load_file(directory / WEIGHTS_FILE))
    require_finite(model, directory)
    return model
