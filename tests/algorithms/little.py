"""A task of a few numbers, whose models return, freeze and mismatch whatever a test needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import Batch, ClientData, DataReport, Examples, Models, Outputs
from fedkd_flwr.tasks.base import TensorExamples
from fedkd_flwr.tasks.scores import CLASSIFICATION_METRICS, classification_scores, predict

NUM_WORDS, NUM_CLASSES, NUM_TOKENS = 12, 3, 6


@dataclass(frozen=True)
class Net:
    """Description of one model.

    Attributes:
        num_layers: each returns a hidden state and an attention map.
        width: of the hidden states.
        num_heads: of the attention maps.
        stride: every so many tokens are seen.
        hidden: whether hidden states are returned when asked for.
        attention: whether attention maps are.
        frozen: whether the embedding, as wide as the vocabulary is long, does not learn.
    """

    num_layers: int = 2
    width: int = 4
    num_heads: int = 2
    stride: int = 1
    hidden: bool = True
    attention: bool = True
    frozen: bool = False

    def build(self) -> "Reader":
        return Reader(self)


class Reader(nn.Module):
    """Tokens to classes."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.embedding = nn.Embedding(NUM_WORDS, net.width)
        self.embedding.weight.requires_grad_(not net.frozen)
        self.norm = nn.BatchNorm1d(net.width)
        self.heads = nn.ModuleList(nn.Linear(net.width, net.num_heads) for _ in range(net.num_layers))
        self.layers = nn.ModuleList(nn.Linear(net.width, net.width) for _ in range(net.num_layers))
        self.classifier = nn.Linear(net.width, NUM_CLASSES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        state = self.embedding(tokens[:, :: self.net.stride])
        states, maps = [state], []
        for heads, layer in zip(self.heads, self.layers, strict=True):
            scores = heads(state).transpose(1, 2)
            maps.append((scores[..., None] * scores[..., None, :]).softmax(dim=-1))
            state = state + layer(maps[-1].mean(dim=1) @ state).tanh()
            states.append(state)
        return self.classifier(self.norm(state.mean(dim=1))), tuple(states), tuple(maps)


class Little:
    """The first word decides the class. Client n has teacher n."""

    counts_labels = False
    metrics = CLASSIFICATION_METRICS

    def __init__(
        self, teachers: Sequence[Net] = (Net(),), student: Net | None = None, class_weights: Tensor | None = None
    ) -> None:
        self._teachers = teachers
        self._student = student or Net(num_layers=1)
        self._class_weights = class_weights
        words = torch.randint(NUM_WORDS, (64, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
        self._words, self._labels = words, words[:, 0] % NUM_CLASSES

    def client_data(self, partition_id: int) -> ClientData:
        start = 16 * (partition_id + 1)
        teacher = min(partition_id, len(self._teachers) - 1)
        return ClientData(self._rows(start, start + 11), self._rows(start + 11, start + 16), teacher)

    def test_data(self) -> Examples:
        return self._rows(0, 16)

    def data_report(self) -> DataReport:
        return DataReport((), ())

    def build_models(self, seed: int) -> Models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = self._student.build()
            first, *others = (net.build() for net in self._teachers)
            return Models(first, student, tuple(others))

    def example_batch(self) -> Batch:
        return {"words": torch.zeros(1, NUM_TOKENS, dtype=torch.int64), "labels": torch.zeros(1, dtype=torch.int64)}

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        assert isinstance(model, Reader)
        logits, states, maps = model(batch["words"])
        return Outputs(
            logits,
            batch["labels"],
            states if hidden_states and model.net.hidden else None,
            maps if attentions and model.net.attention else None,
            class_weights=self._class_weights,
        )

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        return predict(self, model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        return classification_scores(predictions)

    def export(self, model: nn.Module, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), directory / "model.safetensors")

    def _rows(self, start: int, end: int) -> TensorExamples:
        return TensorExamples({"words": self._words[start:end], "labels": self._labels[start:end]})
