"""Outputs up, a model down: the server turns what clients' models say into a model, on mixed-up samples of theirs.

Oh et al., 2020, https://arxiv.org/abs/2006.09801: FLD, MixFLD and Mix2FLD, for links whose uplink is the narrow one. In
a client's first round its mixtures go up with its outputs (`mixtures.py`). The server takes `num_steps` steps on

    phi(F(x), y) + beta * phi(F(x), G[y])

where G[y] is the mean output of all clients for label y; MixFLD on the mixtures with their soft labels, Mix2FLD on
what it gets by combining mixtures of different clients. How the model moved is broadcast through the experiment's
compressor, as any update.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MakeCodec,
    MeanUpdateServer,
    Metrics,
    SharedModel,
    Trained,
    Wires,
    num_parameters,
)
from fedkd_flwr.algorithms.fd import num_labels_of
from fedkd_flwr.algorithms.fedavg import common_model
from fedkd_flwr.algorithms.label_outputs import OUTPUTS, LabelOutputs, LabelOutputsCodec, Precision, Weighting
from fedkd_flwr.algorithms.loop import LocalTraining, Optimizer, OptimizerOptions, forward, run_epochs
from fedkd_flwr.algorithms.mixtures import (
    DEVICE,
    MAJOR,
    MINOR,
    SEEDS,
    GatheredSeeds,
    Mixtures,
    SeededOutputsCodec,
    crossed,
    mixed,
    unmixed,
)
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.losses import soft_cross_entropy, task_loss
from fedkd_flwr.core.protocols import Batch, ClientData, Task
from fedkd_flwr.core.seeds import derive_seed

_LABELS = "labels"


class ConversionOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How the server turns outputs into a model.

    Attributes:
        num_steps: of the server's optimiser in each round.
        batch_size: samples of a step, drawn anew for each.
        beta: weight of the mean outputs beside the labels.
        optimizer: the server's; its moments begin afresh in each round.
    """

    num_steps: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=1)
    beta: float = Field(0.1, ge=0)
    optimizer: OptimizerOptions = OptimizerOptions()


class MixFldOptions(AlgorithmOptions):
    """Options of MixFLD.

    Attributes:
        model: which of the task's models is shared.
        local: how a client trains in a round.
        optimizer: the client's.
        num_seeds: mixtures that each client sends, once.
        mixing: weight lam of the lighter of two mixed examples, in (0, 0.5); undoing it multiplies noise by
            1 / (1 - 2 lam).
        weighting: how clients count in the mean output of a label; see `FdOptions`.
        precision: of a probability on the wire.
        conversion: how the server turns outputs into a model.
    """

    weighs_by_examples: ClassVar[bool] = False
    name: Literal["mixfld"] = "mixfld"
    model: Literal["teacher", "student"] = "teacher"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    num_seeds: int = Field(10, ge=1, le=10_000)
    mixing: float = Field(0.2, gt=0, lt=0.5)
    weighting: Weighting = "uniform"
    precision: Precision = "float16"
    conversion: ConversionOptions = ConversionOptions()

    @property
    def inverse(self) -> bool:
        """Whether the server undoes the mixing across clients."""
        return False

    def build(self, task: Task, seed: int) -> Algorithm:
        """The algorithm on the task's chosen model.

        Raises:
            ValueError: if labels are no classes, a label is held by nobody, inputs can't be mixed, or clients have
                different models.
        """
        name, shape = _mixable(task)
        models = task.build_models(seed)
        model = common_model(models, self.model)
        num_labels = num_labels_of(task, [model])
        if self.inverse:
            _require_crossing(task)
        shared = SharedModelByOutputs(task, self, num_labels, shape, model)
        client = MixFldClient(task, shared, self, name, num_labels, seed)
        server = ConvertingServer(task, shared, self, name)
        num_numbers = self.num_seeds * int(np.prod(shape, dtype=np.int64))
        note = (
            f"each client sends {self.num_seeds} mixtures of two of its own examples, {self.mixing:g} of one and "
            f"{1 - self.mixing:g} of the other, in its first round: {num_numbers} bytes that show what its data is like"
        )
        return Algorithm(
            "outputs",
            shared,
            client,
            server,
            *num_parameters(models),
            make_aggregator=lambda: GatheredSeeds(self.weighting, self.local.num_epochs),
            leaves=f"for each label the mean output of the {self.model}, and once {self.num_seeds} mixtures of its "
            "examples",
            stays=f"the {self.model}",
            notes=(note,),
            first_upload_bytes=shared.up.mixtures_bytes,
        )


class Mix2FldOptions(MixFldOptions):
    """Options of Mix2FLD: those of MixFLD, whose mixing the server undoes across clients."""

    name: Literal["mix2fld"] = "mix2fld"  # type: ignore[assignment]

    @property
    def inverse(self) -> bool:
        """It does."""
        return True


def _mixable(task: Task) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the one input that consists of numbers.

    Raises:
        ValueError: if there is none: words can't be mixed.
    """
    batch = task.example_batch()
    found = {name: tuple(value.shape[1:]) for name, value in batch.items() if value.is_floating_point()}
    if len(found) != 1:
        raise ValueError("task.name: only images can be mixed, whose input is numbers; take such a task, or fd")
    [(name, shape)] = found.items()
    return name, shape


def _require_crossing(task: Task) -> None:
    """Do nothing if two clients can have mixtures whose labels are crossed, or who has which label is not known here.

    Raises:
        ValueError: if no two clients have two labels in common.
    """
    report = task.data_report()
    counts = np.array(report.label_counts) > 0
    if not report.of_all:
        return
    both = counts[:, :, None] & counts[:, None, :]
    both[:, np.arange(counts.shape[1]), np.arange(counts.shape[1])] = False
    if not (both.sum(axis=0) > 1).any():
        raise ValueError(
            "algorithm.name: mix2fld unmixes what two clients have mixed of the same two labels, got no two clients "
            "with two labels in common; take mixfld, or divide the data otherwise"
        )


class SharedModelByOutputs(SharedModel):
    """A model that moves by the server's updates, while outputs and mixtures go up."""

    def __init__(
        self, task: Task, options: MixFldOptions, num_labels: int, shape: tuple[int, ...], module: torch.nn.Module
    ) -> None:
        super().__init__(task, module)
        outputs = LabelOutputsCodec(num_labels, options.precision, with_round=False)
        self.up = SeededOutputsCodec(outputs, options.num_seeds, shape, num_labels)
        options.local.place(module)

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """Outputs and mixtures up; the user's codec down."""
        return Wires(self.up, make_codec(self._spec, "downlink"))


class MixFldClient:
    """Client half: trains from the shared model, says what it makes of each label, and once sends mixtures."""

    def __init__(
        self, task: Task, shared: SharedModelByOutputs, options: MixFldOptions, name: str, num_labels: int, seed: int
    ) -> None:
        self._task, self._shared, self._options, self._seed = task, shared, options, seed
        self._name, self._num_labels = name, num_labels

    def initial_private(self, data: ClientData) -> Arrays:
        """Nothing is on a client at first."""
        return {}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """One round; mixtures go up until a reply with them has counted."""
        module = self._shared.module
        self._shared.load(shared)
        optimizer = Optimizer(self._options.optimizer, module.named_parameters())
        said = LabelOutputs(self._num_labels)

        def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            out = forward(self._task, module, batch, self._options.local)
            said.add(out.logits, out.labels)
            loss = task_loss(out)
            return loss, {"train_loss": loss.detach()}

        self._options.local.prepare(module)
        measures = run_epochs(data.train, self._options.local, assignment, [optimizer], loss_of)
        mixtures = self._mixtures(data) if assignment.counted_round == 0 else None
        upload = {**said.means(self._options.weighting), **self._shared.up.arrays(mixtures)}
        return Trained(upload, {}, {name: float(np.mean(values)) for name, values in measures.items()})

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the shared model."""
        return {"shared": self._shared.score(shared, data.test)}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """There is no private model."""
        return False

    def _mixtures(self, data: ClientData) -> Mixtures:
        """The same whenever they are made: other ones, beside those of an earlier round, would tell more."""
        [batch] = data.train.batches(len(data.train))
        inputs, labels = (batch[name].numpy() for name in (self._name, _LABELS))
        seed = derive_seed(self._seed, "mixtures", data.client)
        return mixed(inputs, labels, self._options.num_seeds, self._options.mixing, seed)


class Samples:
    """What the server learns from: mixtures as they are, or what becomes of pairs of them, made when it is drawn.

    Args:
        mixtures: of all clients.
        pairs: see `crossed`; None for the mixtures themselves.
        lam: as they were mixed.
        num_labels: L.
    """

    def __init__(self, mixtures: Mixtures, pairs: Array | None, lam: float, num_labels: int) -> None:
        self._mixtures, self._pairs, self._lam, self._num_labels = mixtures, pairs, lam, num_labels

    def __len__(self) -> int:
        """How many there are."""
        return len(self._mixtures.minor) if self._pairs is None else 2 * len(self._pairs)

    def of(self, drawn: Array) -> tuple[Tensor, Tensor]:
        """Inputs [count, ...], and labels [count, L] as probabilities, of some samples by number."""
        if self._pairs is not None:
            inputs, hard = unmixed(self._mixtures, self._pairs, self._lam, drawn)
            return torch.from_numpy(inputs), self._hot(hard)
        minor, major = (self._hot(labels[drawn]) for labels in (self._mixtures.minor, self._mixtures.major))
        return torch.from_numpy(self._mixtures.inputs[drawn]), self._lam * minor + (1 - self._lam) * major

    def _hot(self, labels: Array) -> Tensor:
        return torch.nn.functional.one_hot(torch.from_numpy(labels), self._num_labels).float()


class ConvertingServer(MeanUpdateServer):
    """Server half: a few steps on mixtures, towards their labels and what clients say of these."""

    def __init__(self, task: Task, shared: SharedModelByOutputs, options: MixFldOptions, name: str) -> None:
        super().__init__(shared)
        self._task, self._model, self._options, self._name = task, shared, options, name

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """How the model moved.

        Raises:
            ValueError: if no client sent mixtures, or none that can be combined.
        """
        self._train(shared, self._samples(aggregate), torch.from_numpy(aggregate[OUTPUTS]), assignment)
        return self._model.update(shared)

    def _samples(self, aggregate: Arrays) -> "Samples":
        """What there is to learn from."""
        lam, num_labels = self._options.mixing, len(aggregate[OUTPUTS])
        if SEEDS not in aggregate:
            raise ValueError("no client has sent mixtures: each has examples of one label only")
        minor, major = (aggregate[name].astype(np.int64) for name in (MINOR, MAJOR))
        mixtures = Mixtures(aggregate[SEEDS], minor, major)
        if not self._options.inverse:
            return Samples(mixtures, None, lam, num_labels)
        pairs = crossed(mixtures, aggregate[DEVICE])
        if not len(pairs):
            raise ValueError("no two clients have mixtures of the same two labels: raise algorithm.num_seeds")
        return Samples(mixtures, pairs, lam, num_labels)

    def _train(self, shared: Arrays, samples: "Samples", outputs: Tensor, assignment: Assignment) -> None:
        conversion, module = self._options.conversion, self._model.module
        self._model.load(shared)
        optimizer = Optimizer(conversion.optimizer, module.named_parameters())
        self._options.local.prepare(module)
        draw = torch.Generator().manual_seed(derive_seed(assignment.seed, "conversion"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(assignment.seed)
            for _ in range(conversion.num_steps):
                rows = torch.randint(len(samples), (min(conversion.batch_size, len(samples)),), generator=draw)
                inputs, labels = samples.of(rows.numpy())
                aim = labels + conversion.beta * (labels @ outputs)
                batch = {self._name: inputs, _LABELS: aim.argmax(dim=-1)}
                logits = forward(self._task, module, batch, self._options.local).logits
                aim = aim.to(logits)
                soft_cross_entropy(logits, aim, torch.ones(len(rows)).to(logits)).backward()  # type: ignore[no-untyped-call]
                optimizer.step(assignment.begin, assignment.end)
