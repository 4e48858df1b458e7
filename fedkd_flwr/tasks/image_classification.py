"""Any labelled images: a data set of the Hugging Face Hub or local files, with one split for the clients to share.

The server's test set is the test split. A process decodes only the rows it is asked for, and keeps them as bytes.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fedkd_flwr.core.protocols import Batch, ClientData, Examples, Models, Outputs
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.base import (
    RecentClients,
    TaskOptions,
    TensorExamples,
    classification_score,
    copy_shared_tensors,
)
from fedkd_flwr.tasks.partition import (
    IidPartition,
    NaturalPartition,
    Rows,
    TablePartition,
    hold_out,
    natural_indices,
    partition_indices,
    require_client,
)
from fedkd_flwr.tasks.source import DataSource, column_values, require_column

if TYPE_CHECKING:
    from datasets import Dataset

MODES = {1: "L", 3: "RGB"}  # Pillow's name for images of so many channels
DECODED_BYTES = 256 * 2**20  # of clients' images that one process keeps
ROWS_AT_ONCE = 256
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


# A second kind of model makes this Annotated[CnnOptions | ..., Field(discriminator="name")].
ImageModelOptions = CnnOptions


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
    """The model that `save_cnn` wrote."""
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["model"]
    shape, num_classes = config.pop("image_shape"), config.pop("num_classes")
    model = CnnOptions.model_validate(config).build(tuple(shape), num_classes)
    model.load_state_dict(load_file(directory / WEIGHTS_FILE))
    return model


def _one_or_each(value: object) -> object:
    return (value,) if isinstance(value, int | float) else value


class ImageClassificationOptions(TaskOptions):
    """Options of the image classification task.

    Attributes:
        source: the data.
        image_column: holds the images.
        label_column: holds whole numbers from 0.
        partition: how the training split is divided.
        client_test_fraction: share of its training rows that a client keeps for its own score, in (0, 1), unless a
            natural partition gives it rows of the test split.
        max_examples_per_class: most training examples of one class that a client has, drawn by the seed.
        image_size: side in pixels to which images are resized; null leaves them, and they must be of one size.
        channels: 1 is grey, 3 is RGB; images are converted.
        pixel_mean: subtracted from pixels in [0, 1]; one number, or one for each channel.
        pixel_std: divides what is left.
        teacher: the large model.
        student: the small model; it starts with the teacher's tensors where names and shapes agree.
    """

    name: Literal["image_classification"] = "image_classification"
    source: DataSource
    image_column: str = Field("image", min_length=1)
    label_column: str = Field("label", min_length=1)
    partition: TablePartition = IidPartition()
    client_test_fraction: float = Field(0.2, gt=0, lt=1)
    max_examples_per_class: int | None = Field(None, ge=1)
    image_size: int | None = Field(None, ge=1, le=4096)
    channels: Literal[1, 3] = 3
    pixel_mean: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(_one_or_each)] = (0.5,)
    pixel_std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_one_or_each)] = (0.5,)
    teacher: ImageModelOptions = CnnOptions()
    student: ImageModelOptions = CnnOptions()

    @model_validator(mode="after")
    def _constants_fit_channels(self) -> Self:
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(
                    f"{name} must be one number, or one for each of channels ({self.channels}), "
                    f"got {len(getattr(self, name))}"
                )
        return self

    def build(self, num_clients: int, seed: int) -> "ImageClassification":
        """The task, its training split divided among `num_clients`."""
        return ImageClassification(self, num_clients, seed)


class ImageClassification:
    """The image classification task; see the module's text."""

    def __init__(self, options: ImageClassificationOptions, num_clients: int, seed: int) -> None:
        self._options = options
        self._seed = seed
        train, test = options.source.load()
        self._train, self._test = (_Images(table, options) for table in (train, test))
        self._label_names = _label_names(train, options.label_column, self._train.labels, self._test.labels)
        self._train_rows, self._test_rows = self._divided(train, test, num_clients)
        self._shape = self._train.shape
        self._clients = RecentClients(DECODED_BYTES)
        for key, model in (("teacher", options.teacher), ("student", options.student)):
            try:
                model.num_features(self._shape)
            except ValueError as error:
                raise ValueError(f"task.{key}: {error}") from None

    def client_data(self, partition_id: int) -> ClientData:
        """Data of one client: its part of the training split, and its part of the test split or a share of the former.

        Raises:
            ValueError: if there is no such client, or an image can't be read.
        """
        require_client(partition_id, len(self._train_rows))
        return self._clients.get(partition_id, lambda: self._client_data(partition_id))

    def test_data(self) -> Examples:
        """The whole test split."""
        return self._test_data

    def build_models(self, seed: int) -> Models:
        """Teacher with random weights from `seed`; the student is cut from it where names and shapes agree."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            teacher = self._options.teacher.build(self._shape, len(self._label_names))
            student = self._options.student.build(self._shape, len(self._label_names))
        copy_shared_tensors(teacher, student)
        return Models(teacher, student)

    def example_batch(self) -> Batch:
        """A grey image."""
        return {"pixel_values": torch.zeros(1, *self._shape), "labels": torch.zeros(1, dtype=torch.int64)}

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a model on images of shape [batch, channels, height, width]; it has no hidden states to return."""
        return Outputs(model(batch["pixel_values"]), batch["labels"])

    def score(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """Accuracy in [0, 1] and cross-entropy in nats."""
        return classification_score(self, model, examples)

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write a directory that `load_cnn` loads."""
        assert isinstance(model, Cnn)
        kept = ("image_size", "channels", "pixel_mean", "pixel_std")
        pixels = self._options.model_dump(mode="json", include=set(kept))
        save_cnn(model, directory, {"pixels": pixels, "label_names": self._label_names})

    def _divided(self, train: "Dataset", test: "Dataset", num_clients: int) -> tuple[list[list[int]], list[list[int]]]:
        partition = self._options.partition
        if not isinstance(partition, NaturalPartition):
            labels, seed = self._train.labels.tolist(), derive_seed(self._seed, "partition")
            return partition_indices(labels, partition, num_clients, seed), [[]] * num_clients
        column, key = partition.column, "task.partition.column"
        of_test = column_values(test, column, key) if column in test.column_names else []
        rows, test_rows = natural_indices(column_values(train, column, key), of_test, partition, num_clients)
        for client in range(num_clients):
            if len(rows[client]) < 2 and not test_rows[client]:
                raise ValueError(
                    f"task.partition: client {client} has one training example and none in the test split, "
                    "which leaves it nothing to score on; use another partition or remove the row"
                )
        return rows, test_rows

    def _client_data(self, client: int) -> tuple[ClientData, int]:
        train, test = np.array(self._train_rows[client]), np.array(self._test_rows[client], np.int64)
        test_images = self._test
        if not len(test):
            seed = derive_seed(self._seed, "client split", client)
            train, test = hold_out(train, self._options.client_test_fraction, seed)
            test_images = self._train
        if (most := self._options.max_examples_per_class) is not None:
            drawn = np.random.default_rng(derive_seed(self._seed, "examples per class", client)).permutation(train)
            labels = self._train.labels[drawn]
            train = np.concatenate([drawn[labels == label][:most] for label in np.unique(labels)])
        mine, held_out = self._train.examples(train, self._shape), test_images.examples(test, self._shape)
        return ClientData(train=mine, test=held_out), mine.num_bytes + held_out.num_bytes

    @cached_property
    def _test_data(self) -> Examples:
        return self._test.examples(np.arange(len(self._test.labels)), self._shape)


class _Images:
    """One split: labels at hand, images decoded when asked for."""

    def __init__(self, table: "Dataset", options: ImageClassificationOptions) -> None:
        # Imported here: it takes seconds, and checking a configuration should not.
        from datasets import Image

        column = options.image_column
        require_column(table, column, "task.image_column")
        try:
            self._encoded = table.select_columns([column]).cast_column(column, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
            raise ValueError(
                f"task.image_column: {column!r} holds no images but {table.features[column]}; name another column"
            ) from error
        self._decode = Image().decode_example
        self._split = str(table.split)
        self._options = options
        self.labels: Rows = _labels(table, options.label_column)

    @property
    def shape(self) -> ImageShape:
        """Of the first image, as all must be."""
        channels, height, width = self._pixels(0, self._encoded[0][self._options.image_column]).shape
        return channels, height, width

    def examples(self, rows: Rows, shape: ImageShape) -> "ImageExamples":
        """Decode some rows, which must have that shape."""
        images = np.empty((len(rows), *shape), np.uint8)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE].tolist()
            encoded = self._encoded[some][self._options.image_column]
            for position, (row, value) in enumerate(zip(some, encoded, strict=True), start):
                pixels = self._pixels(row, value)
                if pixels.shape != shape:
                    raise ValueError(
                        f"task.image_size: images differ in size: row {row} of split {self._split!r} is "
                        f"{pixels.shape[2]}x{pixels.shape[1]} pixels, the first training image "
                        f"{shape[2]}x{shape[1]}; set image_size to resize them"
                    )
                images[position] = pixels
        constants = [torch.tensor(c).reshape(-1, 1, 1) for c in (self._options.pixel_mean, self._options.pixel_std)]
        return ImageExamples(torch.from_numpy(images), torch.from_numpy(self.labels[rows]), *constants)

    def _pixels(self, row: int, encoded: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        from PIL.Image import Resampling

        try:
            image = self._decode(encoded).convert(MODES[self._options.channels])
        except Exception as error:  # each file format has its own
            raise ValueError(
                f"task.image_column: the image of row {row} of split {self._split!r} can't be read "
                f"({type(error).__name__}); remove or replace it"
            ) from error
        if (side := self._options.image_size) is not None:
            image = image.resize((side, side), Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


class ImageExamples:
    """Images in memory, one byte for each value, standardised batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self._stored = TensorExamples({"pixel_values": images, "labels": labels})
        self._mean, self._std = mean, std
        self.num_bytes = images.nbytes + labels.nbytes

    def __len__(self) -> int:
        """Number of images."""
        return len(self._stored)

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All images once, in batches; shuffled by `seed`, in order when it is None."""
        for batch in self._stored.batches(batch_size, seed):
            pixels = batch["pixel_values"].float() / 255
            yield {**batch, "pixel_values": (pixels - self._mean) / self._std}


def _labels(table: "Dataset", column: str) -> Rows:
    from datasets import ClassLabel, Value

    values = column_values(table, column, "task.label_column")
    feature = table.features[column]
    whole = isinstance(feature, ClassLabel | Value) and feature.dtype.startswith(("int", "uint"))
    if not whole or None in values:
        raise ValueError(
            f"task.label_column: {column!r} of split {str(table.split)!r} must hold a whole number in every row, "
            f"its type is {feature}; name another column"
        )
    labels = np.array(values, np.int64)
    if (least := int(labels.min())) < 0:
        raise ValueError(
            f"task.label_column: {column!r} of split {str(table.split)!r} has the label {least}, labels start at 0; "
            "a split without labels can't be used"
        )
    return labels


def _label_names(table: "Dataset", column: str, train: Rows, test: Rows) -> list[str]:
    """The classes: those that the table names, else as many as the training labels count."""
    names: list[str] | None = getattr(table.features[column], "names", None)
    if names is None:
        names = [str(label) for label in range(int(train.max()) + 1)]
    if len(names) < 2:
        raise ValueError(f"task.label_column: {column!r} has one class only; name another column")
    if (greatest := int(max(train.max(), test.max()))) >= len(names):
        raise ValueError(
            f"task.label_column: {column!r} has the label {greatest}, the training split's classes are "
            f"0 to {len(names) - 1}; name another column or test_split"
        )
    return names
