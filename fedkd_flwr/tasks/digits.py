"""Handwritten digits: 1,797 real 8x8 grey images that ship with scikit-learn, in ten classes.

Teacher and student are Hugging Face Vision Transformers over 2x2 patches. The student is the teacher's first layers, or
a model of its own where it has another width.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import nn

from fedkd_flwr.core.modules import on_device_of
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import (
    Batch,
    ClientData,
    CommonAnswer,
    DataReport,
    Examples,
    Models,
    Outputs,
    PublicExamples,
)
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.base import (
    TaskOptions,
    TensorExamples,
    copy_shared_tensors,
    save_pretrained,
)
from fedkd_flwr.tasks.partition import (
    DirichletPartition,
    Partition,
    Rows,
    client_notes,
    hold_out,
    label_counts,
    largest_class,
    partition_indices,
    require_client,
)
from fedkd_flwr.tasks.public import HeldOutOptions, PublicRows, held_out
from fedkd_flwr.tasks.scores import CLASSIFICATION_METRICS, classification_scores, predict

NUM_CLASSES = 10
PIXELS_PER_SIDE = 8
PIXEL_MEAN, PIXEL_STD = 4.884, 6.017  # of the bundled images, whose pixels count 0 to 16
# The library's 0.02 suits its own width of 768; a layer's output keeps its size when this scales with 1 / sqrt(width).
INITIALIZER_RANGE, INITIALIZER_WIDTH = 0.02, 768
TEST_FRACTION = 0.2  # 360 of 1,797 images, the same for every seed


class VitOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Size of a Vision Transformer."""

    num_layers: int = Field(6, ge=1)
    hidden_size: int = Field(64, ge=1)
    num_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads}")
        return self


class DigitsOptions(TaskOptions):
    """Options of the digits task.

    Attributes:
        partition: how the training images are divided.
        client_test_fraction: share of a client's images that it keeps for its own score, in (0, 1).
        teacher: the large model.
        student: the small model; no deeper than the teacher.
        public: training images that no client has and every node knows, without their labels; null: none.
    """

    name: Literal["digits"] = "digits"
    partition: Partition = DirichletPartition()
    client_test_fraction: float = Field(0.2, gt=0, lt=1)
    teacher: VitOptions = VitOptions()
    student: VitOptions = VitOptions(num_layers=2)
    public: HeldOutOptions | None = None

    @model_validator(mode="after")
    def _student_within_teacher(self) -> Self:
        if self.student.num_layers > self.teacher.num_layers:
            raise ValueError(
                f"student.num_layers must be at most teacher.num_layers ({self.teacher.num_layers}), "
                f"got {self.student.num_layers}"
            )
        return self

    def build(self, num_clients: int, seed: int) -> "Digits":
        """The task, its training images divided among `num_clients`."""
        return Digits(self, num_clients, seed)


class Digits:
    """The digits task; see the module's text."""

    counts_labels = True
    metrics = CLASSIFICATION_METRICS

    def __init__(self, options: DigitsOptions, num_clients: int, seed: int) -> None:
        self._options = options
        self._seed = seed
        self._images, self._labels, self._train_rows, self._test_rows = _digits()
        self._public_rows: Rows | None = None
        if options.public is not None:
            self._public_rows, self._train_rows = held_out(self._train_rows, options.public.num_examples, seed)
        labels = self._labels[self._train_rows].tolist()
        self._partition = partition_indices(labels, options.partition, num_clients, derive_seed(seed, "partition"))

    def client_data(self, partition_id: int) -> ClientData:
        """Data of one client: its part of the training images, divided again into train and test.

        Raises:
            ValueError: if there is no such client.
        """
        require_client(partition_id, len(self._partition))
        train, test = self._split(partition_id)
        counts = np.bincount(self._labels[train], minlength=NUM_CLASSES)
        return ClientData(
            self._examples(train), self._examples(test), label_counts=tuple(counts.tolist()), client=partition_id
        )

    def _split(self, client: int) -> tuple[Rows, Rows]:
        """Rows that a client learns from and rows that it scores on."""
        rows = self._train_rows[np.array(self._partition[client])]
        return hold_out(rows, self._options.client_test_fraction, derive_seed(self._seed, "client split", client))

    def test_data(self) -> Examples:
        """The server's 360 images."""
        return self._examples(self._test_rows)

    def public_examples(self) -> PublicExamples | None:
        """Images that are held out of the training images."""
        rows = self._public_rows
        return None if rows is None else PublicRows(rows, self._public_images)

    def common_answer(self) -> CommonAnswer | None:
        """The digit that most training images show."""
        return largest_class(self.data_report())

    def data_report(self) -> DataReport:
        """Labels of the images that each client learns from."""
        counts = label_counts(
            self._labels.numpy(), [self._split(n)[0] for n in range(len(self._partition))], NUM_CLASSES
        )
        return DataReport(tuple(map(str, range(NUM_CLASSES))), counts, client_notes(counts))

    def build_models(self, seed: int) -> Models:
        """Teacher with random weights from `seed`; the student is cut from it where shapes agree."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            teacher = _vit(self._options.teacher)
            student = _vit(self._options.student)
        copy_shared_tensors(teacher, student)
        return Models(teacher, student)

    def example_batch(self) -> Batch:
        """A blank image."""
        side = PIXELS_PER_SIDE
        return {"pixel_values": torch.zeros(1, 1, side, side), "labels": torch.zeros(1, dtype=torch.int64)}

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a Vision Transformer on images of shape [batch, 1, 8, 8]."""
        batch = on_device_of(model, batch)
        out = model(
            pixel_values=batch["pixel_values"], output_hidden_states=hidden_states, output_attentions=attentions
        )
        return Outputs(out.logits, batch["labels"], out.hidden_states, out.attentions)

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """Log-probabilities of the classes of each example."""
        return predict(self, model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """Accuracy and macro-F1 in [0, 1]; loss in nats."""
        return classification_scores(predictions)

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write a directory that `ViTForImageClassification.from_pretrained` loads."""
        save_pretrained(model, directory)

    def _public_images(self, rows: Rows, positions: Rows) -> TensorExamples:
        return TensorExamples({"pixel_values": self._images[rows], "labels": torch.from_numpy(positions)})

    def _examples(self, rows: Rows) -> TensorExamples:
        return TensorExamples({"pixel_values": self._images[rows], "labels": self._labels[rows]})


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    # Imported here: it takes a second, and other tasks should not.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor((pixels - PIXEL_MEAN) / PIXEL_STD, dtype=torch.float32).reshape(
        -1, 1, PIXELS_PER_SIDE, PIXELS_PER_SIDE
    )
    # One split for every seed, so that results of different seeds are scored on the same images.
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0)
    return images, torch.tensor(labels, dtype=torch.int64), train, test


def _vit(options: VitOptions) -> nn.Module:
    # Imported here: it takes seconds, and checking a configuration should not.
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(  # type: ignore[call-arg]
        image_size=PIXELS_PER_SIDE,
        patch_size=2,
        num_channels=1,
        num_hidden_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_heads,
        intermediate_size=options.intermediate_size,
        initializer_range=INITIALIZER_RANGE * (INITIALIZER_WIDTH / options.hidden_size) ** 0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=NUM_CLASSES,
        id2label={label: str(label) for label in range(NUM_CLASSES)},
        label2id={str(label): label for label in range(NUM_CLASSES)},
        attn_implementation="eager",  # the others return no attention maps
    )
    return ViTForImageClassification(config)
