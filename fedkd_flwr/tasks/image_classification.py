"""Any labelled images: a data set of the Hugging Face Hub or local files, with one split for the clients to share.

The server's test set is the test split. Models are a small convolutional network or any of Hugging Face.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator
from torch import nn

from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import Batch, DataReport, Examples, Models, Outputs, PublicExamples
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.base import TableTask
from fedkd_flwr.tasks.class_names import LabelNames
from fedkd_flwr.tasks.classification_head import head_notes
from fedkd_flwr.tasks.cnn import CnnOptions, ImageShape
from fedkd_flwr.tasks.data_notes import repeated_notes
from fedkd_flwr.tasks.image_models import (
    IMAGE_HEAD,
    ImageModels,
    ImageStudent,
    ImageTeacher,
    OtherImageTeacher,
    chosen_models,
)
from fedkd_flwr.tasks.images import DECODED_BYTES, ImageExamples, Images, ImageTaskOptions, image_column, most_pixels
from fedkd_flwr.tasks.labels import read_labels
from fedkd_flwr.tasks.layers import LayersOptions
from fedkd_flwr.tasks.partition import IidPartition, OwnPartition, Rows, TablePartition, WholePartition
from fedkd_flwr.tasks.public import PublicImageOptions, PublicRows, held_out, public_notes
from fedkd_flwr.tasks.scores import CLASSIFICATION_METRICS, classification_scores, predict
from fedkd_flwr.tasks.source import DataSource
from fedkd_flwr.tasks.stored_names import stored_names
from fedkd_flwr.tasks.table import ClassWeights, ClientRows, class_weights, left_out, load_tables
from fedkd_flwr.tasks.transformer import TransformerOptions


class ImageColumns(BaseModel, extra="forbid", frozen=True):
    """What the columns are called: the image, null for the only column of type Image, and the label."""

    image: str | None = Field(None, min_length=1)
    label: str = Field("label", min_length=1)


class ImageData(DataSource):
    """A table of images and labels. Attributes: `columns`, their names; the rest as for every source."""

    columns: ImageColumns = ImageColumns()


class ImageClassificationOptions(ImageTaskOptions):
    """Options of image classification; those of pixels are in `ImageTaskOptions`.

    Attributes:
        data: the images.
        label_names: the classes in order; null takes those that the data names, or the texts or numbers it has.
        class_weights: how much a label of each class counts in the task loss: "balanced" by the training split's
            counts, one number for each class, or null for all alike.
        partition: how the training split is divided.
        client_test_fraction: share of its training rows that a client keeps for its own score, in (0, 1), unless a
            natural partition gives it rows of the test split.
        max_examples_per_class: most training examples of one class that a client has, drawn by the seed.
        teacher: the large model.
        student: the small model. One with random weights starts with the teacher's tensors where names and shapes
            agree; one of name layers is cut from a teacher of name transformers.
        other_teachers: for clients that hold another teacher than the rest.
        public: images that every node has, without labels; null: none.
    """

    name: Literal["image_classification"] = "image_classification"
    data: ImageData
    label_names: LabelNames | None = Field(None, min_length=2)
    class_weights: ClassWeights = None
    partition: TablePartition = IidPartition()
    client_test_fraction: float = Field(0.2, gt=0, lt=1)
    max_examples_per_class: int | None = Field(None, ge=1)
    teacher: ImageTeacher = CnnOptions()
    student: ImageStudent = CnnOptions()
    other_teachers: tuple[OtherImageTeacher, ...] = ()
    public: PublicImageOptions | None = None

    @model_validator(mode="after")
    def _models_go_together(self) -> Self:
        kinds = chosen_models(self)
        if isinstance(self.student, LayersOptions) and isinstance(self.teacher, CnnOptions):
            raise ValueError(
                "student.name: layers are cut from a teacher of name transformers, the teacher is cnn; "
                "let the student be cnn too, or change the teacher"
            )
        if self.freeze_embeddings and not any(isinstance(kind, TransformerOptions) for kind in kinds.values()):
            raise ValueError("freeze_embeddings needs a model of name transformers, a cnn has none; set it to false")
        return self

    def build(self, num_clients: int, seed: int) -> "ImageClassification":
        """The task, its training split divided among `num_clients`."""
        self.check_clients(num_clients)
        return ImageClassification(self, num_clients, seed)


class ImageClassification(TableTask):
    """The image classification task; see the module's text."""

    metrics = CLASSIFICATION_METRICS

    def __init__(self, options: ImageClassificationOptions, num_clients: int, seed: int) -> None:
        self._options = options
        self._seed = seed
        train, test = load_tables(options.data, options.partition)
        columns = options.data.columns
        column = image_column(train, columns.image)
        folder = _folder_of(options.data.source)
        self._train, self._test = (Images(table, column, options, folder) for table in (train, test))
        if columns.label == column:
            raise ValueError(f"task.data.columns.label: {column!r} is the column of the images; name another")
        renamed = not isinstance(options.partition, WholePartition)
        key = "task.data.columns.label"
        stored = (
            stored_names(options.data, train, columns.label, key),
            stored_names(options.data, test, columns.label, key),
        )
        labels = read_labels(train, test, columns.label, options.label_names, renamed=renamed, stored=stored)
        self._train_labels, self._test_labels = labels.train, labels.test
        train_rows, train_notes = _usable(str(train.split), self._train, labels.train)
        test_rows, test_notes = _usable(str(test.split), self._test, labels.test)
        self._public: tuple[Images, Rows] | None = None
        if options.public is not None and options.public.source is None:
            held, train_rows = held_out(train_rows, options.public.num_examples, seed)
            self._public = self._train, held
        self._shape = self._train.shape_of(int(train_rows[0]))
        if options.public is not None and self._public is None:
            images, chosen, of_public = _read_public(options, options.public, self._shape, seed)
            self._public, train_notes = (images, chosen), (*train_notes, *of_public)
        self._train.require_shape(train_rows, self._shape)
        self._test.require_shape(test_rows, self._shape)
        rows = ClientRows(
            (train, test),
            (train_rows, test_rows),
            labels.train,
            options.partition,
            num_clients,
            seed,
            options.client_test_fraction,
        )
        super().__init__(options, rows, test_rows, DECODED_BYTES)
        self._labels_read, self._notes = labels, (*train_notes, *test_notes)
        self._usable_train = train_rows
        self._num_classes = len(labels.names)
        weights = class_weights(options.class_weights, labels.train[train_rows], len(labels.names))
        self._models = ImageModels(options, self._shape, labels.names, weights)
        # Many models of Hugging Face normalise over a batch, which takes two images.
        self._join_last = any(not isinstance(kind, CnnOptions) for kind in chosen_models(options).values())

    def data_report(self) -> DataReport:
        """Labels of the images that each client learns from, what was left out, and what is odd about the rows."""
        return self._report

    @cached_property
    def _report(self) -> DataReport:
        repeated: tuple[str, ...] = ()
        if not isinstance(self._options.partition, OwnPartition | WholePartition):
            train, test = self._train, self._test
            rows = train.digests()[self._usable_train], test.digests()[self._usable_test]
            repeated = repeated_notes(*rows, (train.split, test.split))
        heads = head_notes(self._options, IMAGE_HEAD, self._labels_read.names)
        return self._rows.report(self._labels_read, (*self._notes, *repeated, *heads), rows_of=self._rows_of)

    def build_models(self, seed: int) -> Models:
        """Teacher and student as the options say; what has no pretrained weights is drawn from `seed`.

        Raises:
            ValueError: naming a model that can't be built, or that a client has too few images for.
        """
        models = self._models.build(seed)
        # Of a network of the task's own none normalises over a batch.
        if self._join_last and self._alone:
            self._require_one_is_enough(models)
        return models

    def example_batch(self) -> Batch:
        """A grey image."""
        return self._models.example_batch()

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a model on images of shape [batch, channels, height, width]."""
        return self._models.forward(model, batch, hidden_states=hidden_states, attentions=attentions)

    def public_examples(self) -> PublicExamples | None:
        """Images of the training split that no client has, or of another table."""
        if self._public is None:
            return None
        images, rows = self._public
        return PublicRows(
            rows, lambda rows, positions: images.examples(rows, positions, self._shape, join_last=self._join_last)
        )

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """Log-probabilities of the classes of each example."""
        return predict(self, model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """Accuracy and macro-F1 in [0, 1]; loss in nats."""
        return classification_scores(predictions)

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write a directory that `load_cnn` loads, or `from_pretrained` and `pipeline("image-classification")`."""
        self._models.export(model, directory)

    @cached_property
    def _alone(self) -> tuple[int, ...]:
        """Clients with a single training image."""
        if isinstance(self._options.partition, OwnPartition):
            return ()
        return tuple(client for client in range(len(self._rows)) if len(self._rows_of(client)[0]) < 2)

    def _require_one_is_enough(self, models: Models) -> None:
        for key, reason in self._models.failing_on_one(models).items():
            for client in self._alone:
                teacher = self._options.teacher_of(client)
                if key in ("student", f"other_teachers.{teacher - 1}.model" if teacher else "teacher"):
                    raise ValueError(
                        f"task.{key}: {reason}, but client {client} has one training image; choose another "
                        "task.partition, a larger task.image_size, or a model without batch normalisation"
                    )

    def _rows_of(self, client: int) -> tuple[Rows, Rows]:
        """Rows that a client learns from and rows that it scores on; see `ClientRows.of`."""
        train, test = super()._rows_of(client)
        if (most := self._options.max_examples_per_class) is not None:
            drawn = np.random.default_rng(derive_seed(self._seed, "examples per class", client)).permutation(train)
            labels = self._train_labels[drawn]
            train = np.concatenate([drawn[labels == label][:most] for label in np.unique(labels)])
        return train, test

    def _label_counts(self, rows: Rows) -> tuple[int, ...]:
        return tuple(np.bincount(self._train_labels[rows], minlength=self._num_classes).tolist())

    def _examples(self, split: Literal["train", "test"], rows: Rows) -> ImageExamples:
        images, labels = (self._train, self._train_labels) if split == "train" else (self._test, self._test_labels)
        return images.examples(rows, labels[rows], self._shape, join_last=self._join_last)


def _folder_of(source: str) -> Path | None:
    """Where relative paths in a table start: its own folder; a data set of the Hub has none here."""
    path = Path(source)
    return path if path.is_dir() else path.parent if path.is_file() else None


def _read_public(
    options: ImageClassificationOptions, public: PublicImageOptions, shape: ImageShape, seed: int
) -> tuple[Images, Rows, tuple[str, ...]]:
    """Images of another table, the rows of it that are used, and notes on the others."""
    table = public.load()
    try:
        images = Images(table, image_column(table, public.image), options, _folder_of(str(public.source)))
        usable, notes = left_out(str(table.split), _unreadable(images), len(images), images.names)
        images.require_shape(usable, shape)
    except ValueError as error:
        raise ValueError(str(error).replace("task.data.columns.image", "task.public.image")) from error
    return images, held_out(usable, public.num_examples or len(usable), seed)[0], public_notes(notes)


def _unreadable(images: Images) -> dict[str, Any]:
    return {
        "have no image": images.missing,
        "name an image file that is not there": images.absent,
        "have an image that can't be read": images.unreadable,
        f"have an image of more than {most_pixels() or 0:,} pixels, the most that are read": images.large,
        "have an image of 32-bit pixels, to be saved with 8 or 16 bits": images.wide,
    }


def _usable(split: str, images: Images, labels: Rows) -> tuple[Rows, tuple[str, ...]]:
    reasons = _unreadable(images) | {"have no label": labels < 0}
    return left_out(split, reasons, len(images), images.names)
