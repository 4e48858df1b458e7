"""The seam between an algorithm and whoever carries its messages.

An algorithm has two halves, client and server, and names what they exchange. Both ends hold the same **shared** arrays:
version 0 is built from the seed, and every later version is the one before with a **broadcast** applied to it. A client
sends an **upload**; the server's half turns the mean of the uploads into the next broadcast. Two codecs, one for each
direction, carry them. Nothing here says that shared arrays are a model or that uploads are updates of one:

    exchanges   shared arrays        upload                  broadcast
    "updates"   a model              its update              the mean update
    "outputs"   knowledge of all     outputs of one client   what to know next
    "nothing"   -                    -                       -
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn

from fedkd_flwr.core.arrays import Array, Arrays, Spec, apply_update, difference
from fedkd_flwr.core.modules import exchanged_spec, read_arrays, write_arrays
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import ClientData, Codec, Direction, Examples, Models, Range, Task

Exchanges = Literal["updates", "outputs", "nothing"]
Width = Callable[[], int]  # of a checkpoint's hidden states, which may lie on a hub: asked for when it is needed
Metrics = Mapping[str, float]
MakeCodec = Callable[[Spec, Direction], Codec]

# Of means over local steps. A loss of acting may be below 0; beyond these bounds a model has diverged.
_LOSS: Range = (-1e6, 1e6)
TRAIN_METRICS: Mapping[str, Range] = {
    **dict.fromkeys(("train_loss", "teacher_train_loss", "distillation_loss"), _LOSS),
    "min_divisor": (0.0, 1e6),
}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a client is asked to do in one round.

    Attributes:
        progress: where this round lies among the rounds, from 0 in the first to 1 in the last.
        seed: source of all randomness of this client in this round.
        begin: share of all rounds that is done when this one begins, in [0, 1].
        end: the same when it has ended, in (0, 1].
        server_round: counted from 1.
        counted_round: round of this client's last upload that entered an aggregate; 0 where none did.
    """

    progress: float
    seed: int
    begin: float = 0.0
    end: float = 1.0
    server_round: int = 1
    counted_round: int = 0

    @classmethod
    def of_round(
        cls, server_round: int, num_rounds: int, *, progress: float, seed: int, counted_round: int = 0
    ) -> "Assignment":
        """What is asked in one round of `num_rounds`, counted from 1. A round beyond the last lies at the very end."""
        begin, end = (min(done / num_rounds, 1.0) for done in (server_round - 1, server_round))
        return cls(progress, seed, begin, end, server_round, counted_round)


@dataclass(frozen=True, slots=True)
class Trained:
    """What local training leaves behind.

    Attributes:
        upload: what the uplink codec sends; None where nothing is exchanged.
        private: what stays on the client until its next round.
        metrics: means over the local steps, by name.
    """

    upload: Arrays | None
    private: Arrays
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wires:
    """The codec of each direction."""

    uplink: Codec
    downlink: Codec


class SharedState(Protocol):
    """What both ends must agree on, to the bit."""

    def initial(self) -> Arrays:
        """Version 0: the same for every caller with the same experiment."""

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """The two codecs; `make_codec` builds the one that the user chose for updates. None: nothing is exchanged."""

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """The next version."""


class ClientHalf(Protocol):
    """Runs where the data is."""

    def initial_private(self, data: ClientData) -> Arrays:
        """What a client with this data keeps to itself before its first round."""

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """One round of local training."""

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Metrics on the client's own test examples: "shared", "private" and, of both, "ensemble", whichever exist."""

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """Write what the client predicts with where that is not just the shared model; say whether it is."""


class ServerHalf(Protocol):
    """Runs where the uploads meet."""

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """What to send to everyone, from the aggregate of this round's uploads."""

    def evaluate(self, shared: Arrays, examples: Examples) -> Metrics | None:
        """Metrics of the shared model on the server's test set; None where none is shared."""

    def export_shared(self, shared: Arrays, directory: Path) -> bool:
        """Write the shared model where there is one; say whether there is."""


@runtime_checkable
class LearningServer(Protocol):
    """A server half with a model of its own, which no client is sent. It survives the server as its state does."""

    def begin(self) -> None:
        """A run begins: forget those before."""

    def learn(self, shared: Arrays, assignment: Assignment) -> None:
        """Take in a new version."""

    def state(self) -> Arrays:
        """For a checkpoint."""

    def restore(self, state: Arrays) -> None:
        """Go on from a checkpoint."""


class Aggregator(Protocol):
    """Turns the uploads of one round into one."""

    def begin(self, server_round: int) -> None:
        """Forget the uploads of the round before."""

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Take one upload.

        Args:
            upload: float32, about zero where it is an update.
            num_examples: the client's training examples.
            loss: its mean training loss; None where it gave none.
            client: its lasting name, for a rule that keeps something of each client.

        Raises:
            ValueError: if the rule can't take it, or does not believe it.
        """

    def result(self) -> Arrays | None:
        """The aggregate of what was taken since `begin`; None where the rule gives none for so few.

        Raises:
            ValueError: if the rule can't be applied to these uploads.
        """

    def state(self) -> Arrays:
        """What the next round needs of this one."""

    def restore(self, state: Arrays) -> None:
        """Go on from a state."""


class Length:
    """How long an upload is: the 2-norm over all of its numbers."""

    def norm(self, upload: Arrays) -> float:
        """The norm, in float64."""
        return float(np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in upload.values())))

    def scaled(self, upload: Arrays, factor: float) -> dict[str, Array]:
        """An upload whose norm is the factor times that of this one, and which says the same."""
        return {name: np.asarray(value * np.float32(factor)) for name, value in upload.items()}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Both halves of one algorithm and what they share.

    Attributes:
        exchanges: what crosses the network.
        num_teacher_parameters: trainable parameters of the task's teacher, for the bytes that FedAvg of it would move.
        num_student_parameters: likewise of the student.
        make_aggregator: how uploads become one where a mean of them, or a robust rule, means nothing; None where the
            user's choice does it.
        leaves: what leaves a client, in a few words for its user.
        stays: the models that never leave it, likewise; empty where all of them do.
        notes: one line each: what leaves a client beyond what its name says.
        foundations: gives digests, by name, of what nodes must have alike and are never sent, such as a frozen
            backbone. A node with another one is not taken in.
        first_upload_bytes: of a client's first payload that later ones don't have.
        length: how long an upload is, where its numbers are not those of an update.
        shows_history: whether the shared arrays hold what past broadcasts said: nothing is kept from a client that
            joins late then by sending it these instead.
        weighs_claims: whether outputs of a client count for as many examples as it claims to have; then the claim is
            bounded as it is for updates.
        train_metrics: every metric that local training may give, by name, with its range; see `Task.metrics`.
    """

    exchanges: Exchanges
    shared: SharedState
    client: ClientHalf
    server: ServerHalf
    num_teacher_parameters: int
    num_student_parameters: int
    make_aggregator: Callable[[], Aggregator] | None = None
    leaves: str = "what the algorithm exchanges"
    stays: str = ""
    notes: tuple[str, ...] = ()
    foundations: Callable[[], Mapping[str, bytes]] = dict
    first_upload_bytes: int = 0
    length: Length = field(default_factory=Length)
    shows_history: bool = False
    weighs_claims: bool = False
    train_metrics: Mapping[str, Range] = field(default_factory=lambda: TRAIN_METRICS)


class AlgorithmOptions(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """Options of one algorithm, `name` first. They build it for a task.

    Attributes:
        name: of the algorithm.
        learns_by_acting: whether it can train on an `ActingTask`, whose batches are other examples for every model.
        weighs_by_examples: whether clients count by their examples unless the user says otherwise. An algorithm with a
            rule of its own has its own option for it.
    """

    learns_by_acting: ClassVar[bool] = False
    weighs_by_examples: ClassVar[bool] = True
    name: str

    @abstractmethod
    def build(self, task: Task, seed: int) -> Algorithm:
        """The algorithm on `task`, its version 0 drawn from `seed`."""

    def for_widths(self, teacher: Width | None, student: Width | None) -> Self:
        """The same options, with what was left open decided by which models have loaded weights.

        Args:
            teacher: gives the width of the teacher's hidden states where its weights are loaded; None where they are
                drawn.
            student: likewise the student's.
        """
        return self

    def baselines(self) -> "Sequence[Baseline]":
        """What this algorithm must beat to be worth its trouble; none by default."""
        return ()


@dataclass(frozen=True, slots=True)
class Baseline:
    """What an algorithm is measured against, from the same version 0, with the same epochs, batches and optimisers.

    Attributes:
        name: what distinguishes its runs.
        algorithm: what it optimises.
        against: which score of it counts: of its shared model on the server's test set, or of whatever its clients
            predict with on their own data.
        words: what it is.
        dense: whether it goes uncompressed, and not through the experiment's compressor.
        common_teacher: whether it can't be where clients have different teachers.
    """

    name: str
    algorithm: AlgorithmOptions
    against: Literal["shared", "local"]
    words: str
    dense: bool = False
    common_teacher: bool = False


def num_parameters(models: Models) -> tuple[int, int]:
    """Trainable parameters of teacher and student."""
    teacher, student = (
        sum(tensor.size for tensor in exchanged_spec(model) if tensor.kind == "parameter")
        for model in (models.teacher, models.student)
    )
    return teacher, student


class SharedModel:
    """A model that server and clients hold together, moved by its updates.

    Everything an "updates" algorithm shares: version 0, the user's codec in both directions, the score, the export. The
    module is scratch space; the arrays are the model.

    Args:
        task: what is learned.
        module: of version 0.
        frozen: whether frozen tensors are among the arrays. Without them nobody keeps or is sent what is the same on
            all nodes anyway; see `Algorithm.foundations`.
    """

    def __init__(self, task: Task, module: nn.Module, *, frozen: bool = True) -> None:
        self.module = module
        self._task = task
        self._frozen = frozen
        self._initial = read_arrays(module, frozen=frozen)
        self._spec = exchanged_spec(module)

    def initial(self) -> Arrays:
        """Every tensor of version 0, frozen ones included where they are shared."""
        return self._initial

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """The user's codec, each way."""
        return Wires(make_codec(self._spec, "uplink"), make_codec(self._spec, "downlink"))

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """The model moved by the decoded mean update."""
        return apply_update(shared, broadcast)

    def load(self, shared: Arrays) -> None:
        """Set the module to these arrays."""
        write_arrays(self.module, shared, frozen=self._frozen)

    def update(self, shared: Arrays) -> Arrays:
        """What the module, as trained, adds to `shared`."""
        return difference(read_arrays(self.module), shared, self._spec)

    def score(self, shared: Arrays, examples: Examples) -> Metrics:
        """Metrics of the model with these arrays."""
        return self._task.score(self.predict(shared, examples), examples)

    def predict(self, shared: Arrays, examples: Examples) -> Predictions:
        """What the model with these arrays says of some examples."""
        self.load(shared)
        return self._task.predict(self.module, examples)

    def export(self, shared: Arrays, directory: Path) -> None:
        """Write the model with these arrays."""
        self.load(shared)
        self._task.export(self.module, directory)


class MeanUpdateServer:
    """Server half of every algorithm that averages the updates of one shared model."""

    def __init__(self, shared: SharedModel) -> None:
        self._shared = shared

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """The aggregate itself."""
        return aggregate

    def evaluate(self, shared: Arrays, examples: Examples) -> Metrics | None:
        """Score of the shared model."""
        return self._shared.score(shared, examples)

    def export_shared(self, shared: Arrays, directory: Path) -> bool:
        """Write the shared model."""
        self._shared.export(shared, directory)
        return True


def num_classes_of(task: Task, models: Sequence[nn.Module]) -> int:
    """Classes that all models tell apart.

    Raises:
        ValueError: if an example has several outputs, or models differ.
    """
    shapes = set()
    for model in models:
        with torch.no_grad():
            out = task.forward(model.eval(), task.example_batch(), hidden_states=False, attentions=False)
        shapes.add(tuple(out.logits.shape[1:]))
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            "algorithm: what models say is exchanged, which needs one output for each class, got shapes "
            f"{sorted(shapes)}"
        )
    return int(next(iter(shapes))[0])
