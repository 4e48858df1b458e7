"""FLoRA: federated fine-tuning of adapters of different ranks, aggregated without noise.

Wang et al., NeurIPS 2024, https://arxiv.org/abs/2409.05976. In each round a client trains fresh adapters, of a rank
that it can afford, on the common weights; the server stacks all of them (`adapter_stack.py`) and everybody adds their
product to the common weights. What goes down has the sum of all ranks: with many clients that is dearer than
the weights themselves. Numbers travel as they are, as published; the experiment's compressor has no part.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from fedkd_flwr.algorithms.adapter_stack import (
    HEAD,
    A,
    AdapterCodec,
    AdapterStack,
    B,
    Precision,
    ProductLength,
    Weighting,
    products,
)
from fedkd_flwr.algorithms.base import (
    Algorithm,
    AlgorithmOptions,
    Assignment,
    MakeCodec,
    Metrics,
    Trained,
    Wires,
    num_parameters,
)
from fedkd_flwr.algorithms.fedavg import common_model
from fedkd_flwr.algorithms.loop import (
    LocalTraining,
    Optimizer,
    OptimizerOptions,
    prior_of,
    require_counts,
    train_supervised,
)
from fedkd_flwr.algorithms.lora import AdaptedModels, LoraOptions, Ranks, adapters_of, backbone_digest, plain
from fedkd_flwr.core.arrays import Array, Arrays, TensorSpec
from fedkd_flwr.core.modules import prefixed, read_arrays
from fedkd_flwr.core.protocols import ClientData, Examples, Task
from fedkd_flwr.core.seeds import derive_seed

_CHANGE = "change/"
_LARGEST_STACK = 2**20  # a rank that no sum of ranks reaches


class FloraOptions(AlgorithmOptions):
    """Options of stacked adapters.

    Attributes:
        model: which of the task's models is the backbone.
        lora: its adapters; every client has their alpha.
        ranks: of the clients' adapters, dealt in turn: client c has that at place c modulo their number. null: all have
            that of `lora`.
        weighting: how clients count in the mean of products: all alike, or by their examples.
        precision: of every number on the wire; float32 as published.
        local: how a client trains in a round.
        optimizer: the client's; it begins afresh in each round, as the adapters do.
        logit_adjustment: strength of logit adjustment on each client; see `FedKDOptions`.
    """

    weighs_by_examples: ClassVar[bool] = False
    name: Literal["flora"] = "flora"
    model: Literal["teacher", "student"] = "teacher"
    lora: LoraOptions = LoraOptions()
    ranks: Ranks = None
    weighting: Weighting = "uniform"
    precision: Precision = "float32"
    local: LocalTraining = LocalTraining()
    optimizer: OptimizerOptions = OptimizerOptions()
    logit_adjustment: float = Field(0.0, ge=0)

    def build(self, task: Task, seed: int) -> Algorithm:
        """Stacked adapters on the chosen model.

        Raises:
            ValueError: if clients have different ones, an option names what is not there, training moves statistics of
                the model, or logits are to be adjusted and labels are not counted.
        """
        require_counts(task, self.logit_adjustment)
        models = task.build_models(seed)
        sizes = num_parameters(models)
        backbone = common_model(models, self.model)
        adapted = AdaptedModels((backbone,), self.lora, self.ranks, derive_seed(seed, "adapters"))
        self.local.place(*adapted.all())
        shared = SharedWeights(task, adapted, self)
        digest = backbone_digest(adapted.first)  # now: training moves what lies below the adapters
        return Algorithm(
            "updates",
            shared,
            FloraClient(task, shared, self),
            FloraServer(shared),
            *sizes,
            make_aggregator=lambda: AdapterStack(self.lora.alpha, self.weighting),
            foundations=lambda: {"frozen backbone": digest},
            length=ProductLength(self.lora.alpha),
            leaves=f"the {self.model}'s adapters",
            stays="its frozen backbone",
        )


class SharedWeights:
    """What all add to the adapted layers of the backbone, and the head. The modules are scratch space."""

    def __init__(self, task: Task, adapted: AdaptedModels, options: FloraOptions) -> None:
        self._task = task
        self._adapted = adapted
        self._options = options
        layers = adapters_of(adapted.first)
        self._bases = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
        matrices = {name: (len(base), base[0].numel()) for name, base in self._bases.items()}
        trained = read_arrays(adapted.first, frozen=False)
        if moving := [name for name, _ in adapted.first.named_buffers() if name in trained]:
            raise ValueError(
                f"algorithm.lora: flora averages no statistics of a model such as {moving[0]!r}; name trained_modules "
                "without them, or take lora_avg"
            )
        adapters = {f"{name}.lora_{part}.default.weight" for name in layers for part in "AB"}
        self._head = {name: value for name, value in trained.items() if name not in adapters}
        self._initial: dict[str, Array] = {
            _CHANGE + name: np.zeros(shape, np.float32) for name, shape in matrices.items()
        } | prefixed(HEAD, self._head)
        head = tuple(TensorSpec(name, value.shape) for name, value in self._head.items())
        largest = max(options.ranks or (options.lora.rank,))
        self._wires = Wires(
            AdapterCodec(matrices, head, options.precision, largest),
            AdapterCodec(matrices, head, options.precision, _LARGEST_STACK),
        )

    def initial(self) -> Arrays:
        """No change, and the head of version 0."""
        return self._initial

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """Numbers as they are; the user's codec is for updates of which a mean can be taken."""
        return self._wires

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """The change with the product of the stack added, the head with its update."""
        changes = {_CHANGE + name: shared[_CHANGE + name] + value for name, value in products(broadcast).items()}
        heads = {HEAD + name: shared[HEAD + name] + broadcast[HEAD + name] for name in self._head}
        return changes | heads

    def load(self, shared: Arrays, module: nn.Module, seed: int = 0) -> nn.Module:
        """Set a module to a version, its adapters fresh: they add nothing yet.

        Args:
            shared: the version.
            module: of any rank.
            seed: of the adapters.
        """
        parameters = dict(module.named_parameters())
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, layer in adapters_of(module).items():
                weight = layer.get_base_layer().weight
                change = torch.from_numpy(np.asarray(shared[_CHANGE + name], np.float32)).to(weight.device)
                weight.copy_(self._bases[name].to(weight.device) + change.reshape(weight.shape))
                layer.reset_lora_parameters("default", True)
            for name in self._head:
                parameters[name].copy_(torch.from_numpy(np.asarray(shared[HEAD + name])))
        return module

    def module_of(self, data: ClientData) -> nn.Module:
        """A client's module, of its rank."""
        return self._adapted.of(data)

    def upload(self, shared: Arrays, module: nn.Module) -> Arrays:
        """Adapters of a module that was trained, and the update of its head."""
        arrays = read_arrays(module, frozen=False)
        found: dict[str, Array] = {}
        for name in self._bases:
            a, b = arrays[f"{name}.lora_A.default.weight"], arrays[f"{name}.lora_B.default.weight"]
            found |= {A + name: a.reshape(len(a), -1), B + name: b.reshape(len(b), -1)}
        return found | {HEAD + name: arrays[name] - shared[HEAD + name] for name in self._head}

    def score(self, shared: Arrays, examples: Examples) -> Metrics:
        """Metrics of a version."""
        module = self.load(shared, self._adapted.first)
        return self._task.score(self._task.predict(module, examples), examples)

    def export(self, shared: Arrays, directory: Path) -> None:
        """Write a version as a model without adapters."""
        self._task.export(plain(self.load(shared, self._adapted.first)), directory)


class FloraClient:
    """Client half: fresh adapters on the common weights in each round; nothing is kept."""

    def __init__(self, task: Task, shared: SharedWeights, options: FloraOptions) -> None:
        self._task = task
        self._shared = shared
        self._options = options

    def initial_private(self, data: ClientData) -> Arrays:
        """Nothing is on a client at first."""
        return {}

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """Train adapters of the client's rank, and the head; upload both."""
        options = self._options
        seed = derive_seed(assignment.seed, "adapters")
        module = self._shared.load(shared, self._shared.module_of(data), seed)
        optimizer = Optimizer(options.optimizer, module.named_parameters())
        prior = prior_of(data, options.logit_adjustment)
        metrics = train_supervised(self._task, module, optimizer, data.train, options.local, assignment, prior=prior)
        return Trained(self._shared.upload(shared, module), {}, metrics)

    def evaluate(self, shared: Arrays, private: Arrays, data: ClientData) -> dict[str, Metrics]:
        """Score of the common model."""
        return {"shared": self._shared.score(shared, data.test)}

    def export_private(self, shared: Arrays, private: Arrays, data: ClientData, directory: Path) -> bool:
        """There is no private model."""
        return False


class FloraServer:
    """Server half: the stack goes back as it is."""

    def __init__(self, shared: SharedWeights) -> None:
        self._shared = shared

    def broadcast(self, aggregate: Arrays, shared: Arrays, assignment: Assignment) -> Arrays:
        """The stack of this round."""
        return aggregate

    def evaluate(self, shared: Arrays, examples: Examples) -> Metrics | None:
        """Score of the common model."""
        return self._shared.score(shared, examples)

    def export_shared(self, shared: Arrays, directory: Path) -> bool:
        """Write the common model."""
        self._shared.export(shared, directory)
        return True
