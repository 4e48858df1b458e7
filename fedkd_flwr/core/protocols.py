"""What the axes promise each other: data, models and codecs as seen by code that must not import them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from fedkd_flwr.core.arrays import Arrays, Spec
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.proxy_states import ProxyGrid

Batch = Mapping[str, Tensor]
Direction = Literal["uplink", "downlink"]
Range = tuple[float, float]  # the least and the largest value, both included


@dataclass(frozen=True, slots=True)
class Outputs:
    """One forward pass.

    Attributes:
        logits: [..., classes].
        labels: [...], `losses.NO_LABEL` where a position has none.
        hidden_states: embedding output, then one [batch, tokens, width] per layer; None if not asked for.
        attentions: one [batch, heads, tokens, tokens] per layer; None if not asked for.
        token_mask: [batch, tokens], true where a token is real; None where every token is.
        class_weights: [classes], how much a label of each class counts in the task loss; None where all count alike.
        states: [..., width], what the model saw, where its own actions led there; None where the batch says it all.
        loss: a scalar with a graph, what to minimise where that is not the cross-entropy with the labels.
    """

    logits: Tensor
    labels: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    token_mask: Tensor | None = None
    class_weights: Tensor | None = None
    states: Tensor | None = None
    loss: Tensor | None = None


class Examples(Protocol):
    """A finite set of examples."""

    def __len__(self) -> int:
        """Number of examples."""

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All examples once, in batches; shuffled by `seed`, in order when it is None."""


class DataElsewhereError(ValueError):
    """A client's data is on a node, not where it was asked for."""


@dataclass(frozen=True, slots=True)
class ClientData:
    """What one client holds.

    Attributes:
        train: to learn from.
        test: to score on.
        teacher: which teacher it has: 0 is `Models.teacher`, n is `Models.other_teachers[n - 1]`.
        label_counts: how many labels of each class `train` has, class by class; None where labels are no classes.
        client: number of the client, from 0.
    """

    train: Examples
    test: Examples
    teacher: int = 0
    label_counts: tuple[int, ...] | None = None
    client: int = 0


class PublicExamples(Protocol):
    """Examples that every node has, in one order, without their labels."""

    def __len__(self) -> int:
        """Number of examples."""

    def select(self, positions: Sequence[int]) -> Examples:
        """Some of them. In a batch "labels" are positions, so that an output can be told from another in any order."""

    def digest(self) -> bytes:
        """Of all inputs in their order, 32 bytes."""


@runtime_checkable
class HasPublicExamples(Protocol):
    """A task that may have public examples."""

    def public_examples(self) -> PublicExamples | None:
        """They; None where the experiment names none."""


@dataclass(frozen=True, slots=True)
class Models:
    """Version 0 of what a task trains.

    Attributes:
        teacher: the large model that clients have unless they have another.
        student: the small one that they share.
        other_teachers: those that some clients have instead; see `ClientData.teacher`.
    """

    teacher: nn.Module
    student: nn.Module
    other_teachers: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, slots=True)
class DataReport:
    """What is worth knowing of a task's data before it is used.

    Attributes:
        label_names: of the classes.
        label_counts: for each client, how many labels of each class it learns from; those of examples that it keeps
            to score on are not counted.
        notes: one line each: rows that were left out and why, clients that will find it hard.
        of_all: whether the counts are of all clients. Where nodes bring their data, each knows its own alone, and the
            server none.
    """

    label_names: tuple[str, ...]
    label_counts: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    of_all: bool = True


@dataclass(frozen=True, slots=True)
class CommonAnswer:
    """The answer that is right most often in the training data.

    Attributes:
        label: its index among a model's outputs.
        name: of the class.
        share: of the training labels, in (0, 1]; None where it is no class that examples have.
        num_classes: a model's outputs.
    """

    label: int
    name: str
    share: float | None
    num_classes: int


@runtime_checkable
class HasCommonAnswer(Protocol):
    """A task whose labels may be classes."""

    def common_answer(self) -> CommonAnswer | None:
        """The largest class of the training data; None where labels are no classes, or they are on nodes alone."""


class Task(Protocol):
    """What is learned: data, models and score."""

    @property
    def counts_labels(self) -> bool:
        """Whether clients' data tells how many labels of each class it has; see `ClientData.label_counts`."""

    @property
    def metrics(self) -> Mapping[str, Range]:
        """Every metric that `score` may give, by name, with its range.

        A reply with another metric, or with a value out of range, does not count, because it would spoil the mean over
        the clients. A client leaves out a value of its own that is out of range, such as the loss of a diverged model.
        """

    def client_data(self, partition_id: int) -> ClientData:
        """Data of one client."""

    def test_data(self) -> Examples:
        """The server's global test set."""

    def data_report(self) -> DataReport:
        """How the labels lie among the clients, and what was left out."""

    def build_models(self, seed: int) -> Models:
        """Version 0 of teacher and student: the same for everyone who passes the same seed."""

    def example_batch(self) -> Batch:
        """One made-up example of the right shapes, from which layers and widths can be found without any data."""

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run `model` on a batch."""

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """What `model` says of each example, as log-probabilities."""

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """Metrics of these predictions, by name, the one to compare runs by first."""

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write the model as a directory: one that `from_pretrained` loads where it is a Hugging Face model."""


@runtime_checkable
class ActingTask(Task, Protocol):
    """A task that is learned by acting.

    Its examples are episodes: `forward` plays those of a batch and gives their steps, with `states` and `loss`, and the
    labels are the actions that were taken. Two models never see the same steps, so they can't learn from each other on
    a batch; what they can speak of is proxy states.
    """

    @property
    def num_actions(self) -> int:
        """A, those of every state."""

    @property
    def proxies(self) -> ProxyGrid:
        """Proxy states, the same on all nodes."""

    def policy(self, model: nn.Module, states: Tensor) -> Tensor:
        """Logits of the actions in some states: [N, axes] to [N, A]."""


def score_of(task: Task, model: nn.Module, examples: Examples) -> dict[str, float]:
    """Metrics of one model alone, by name."""
    return task.score(task.predict(model, examples), examples)


class Codec(Protocol):
    """Two ends of a wire. State is carried by the caller and opaque to it: named arrays, empty where none is needed."""

    @property
    def spec(self) -> Spec:
        """The tensors of one payload, in order."""

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload that `encode` ever writes; a longer one is refused before it is read."""

    def initial_state(self) -> Arrays:
        """State of either end before the first payload."""

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """Payload and next state of the sending end."""

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """Update and next state of the receiving end."""
