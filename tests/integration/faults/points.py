"""A task and a codec small enough to run a whole federation in a fraction of a second.

Two interleaved half circles, perceptrons with batch normalisation (so there are buffers, floating and integer), and a
codec with error feedback on both ends that also counts what it has handled: any message lost, repeated or out of order
shows up in its state.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import make_moons
from torch import nn

from fedkd_flwr.compressors.payload import PayloadError
from fedkd_flwr.core.arrays import Array, Arrays, Spec, require_finite
from fedkd_flwr.core.modules import prefixed
from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import Batch, ClientData, DataReport, Examples, Models, Outputs
from fedkd_flwr.tasks.base import TensorExamples
from fedkd_flwr.tasks.scores import CLASSIFICATION_METRICS, classification_scores, predict

PER_CLIENT = 30
STEP = 2.0**-7


class Points:
    """Two moons, divided evenly."""

    counts_labels = False
    metrics = CLASSIFICATION_METRICS

    def __init__(self, num_clients: int, seed: int) -> None:
        points, labels = make_moons(PER_CLIENT * (num_clients + 4), noise=0.2, random_state=seed % 2**32)
        self._points, self._labels = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)

    def client_data(self, partition_id: int) -> ClientData:
        start = PER_CLIENT * (partition_id + 4)
        return ClientData(self._rows(start, start + 24), self._rows(start + 24, start + PER_CLIENT))

    def test_data(self) -> Examples:
        return self._rows(0, 4 * PER_CLIENT)

    def data_report(self) -> DataReport:
        return DataReport(("upper", "lower"), ())

    def build_models(self, seed: int) -> Models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Models(teacher=perceptron(16), student=perceptron(8))

    def example_batch(self) -> Batch:
        return {"points": torch.zeros(2, 2), "labels": torch.zeros(2, dtype=torch.int64)}

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        return Outputs(model(batch["points"]), batch["labels"])

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        return predict(self, model, examples)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        return classification_scores(predictions)

    def export(self, model: nn.Module, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), directory / "model.safetensors")

    def _rows(self, start: int, end: int) -> TensorExamples:
        return TensorExamples({"points": self._points[start:end], "labels": self._labels[start:end]})


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


class FeedbackCodec:
    """Parameters on a coarse grid with the rest kept for the next time, buffers as they are, and a count."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._parameters = [t for t in spec if t.kind == "parameter"]
        self._buffers = [t for t in spec if t.kind == "buffer"]

    @property
    def most_bytes(self) -> int:
        return 4 + sum(2 * t.size for t in self._parameters) + sum(4 * t.size for t in self._buffers)

    def initial_state(self) -> Arrays:
        zeros = {t.name: np.zeros(t.shape, np.float32) for t in self._parameters}
        return {"count": np.array(0), **prefixed("residual/", zeros)}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        require_finite(update)
        parts = [np.array(state["count"], "<u4").tobytes()]
        following: dict[str, Array] = {"count": state["count"] + 1}
        for tensor in self._parameters:
            wanted = update[tensor.name] + state[f"residual/{tensor.name}"]
            steps = np.clip(np.round(wanted / STEP), -32767, 32767).astype("<i2")
            parts.append(steps.tobytes())
            following[f"residual/{tensor.name}"] = wanted - steps.astype(np.float32) * np.float32(STEP)
        parts += [np.asarray(update[t.name], "<f4").tobytes() for t in self._buffers]
        return b"".join(parts), following

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        if len(payload) != self.most_bytes:
            raise PayloadError(f"payload must have {self.most_bytes} bytes, got {len(payload)}")
        count = int(np.frombuffer(payload, "<u4", 1)[0])
        if count != int(state["count"]):
            raise PayloadError(f"encoder is at {count}, decoder at {int(state['count'])}")
        update: dict[str, Array] = {}
        offset = 4
        for tensor in self._parameters:
            steps = np.frombuffer(payload, "<i2", tensor.size, offset).astype(np.float32)
            update[tensor.name] = (steps * np.float32(STEP)).reshape(tensor.shape)
            offset += 2 * tensor.size
        for tensor in self._buffers:
            values = np.frombuffer(payload, "<f4", tensor.size, offset).astype(np.float32)
            if not np.isfinite(values).all():
                raise PayloadError(f"{tensor.name} is not finite")
            update[tensor.name] = values.reshape(tensor.shape)
            offset += 4 * tensor.size
        return update, {**state, "count": state["count"] + 1}


def parameters(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Without the statistics of batch normalisation."""
    return {name: value for name, value in arrays.items() if "running" not in name and "num_batches" not in name}
