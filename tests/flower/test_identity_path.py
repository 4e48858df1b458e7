"""The identity codec against no codec at all, and against Flower's own FedAvg."""

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from transformers import ViTForImageClassification

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.core.arrays import Arrays, Spec, num_elements
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.flower import runtime
from fedkd_flwr.flower.local_grid import LocalGrid, task_identity
from tests.conftest import Run, small

FEDAVG = ("algorithm.name=fedavg", "algorithm.model=student", "compressor.name=identity")


class NoCodec:
    """Raw float32 bytes, one tensor after the other: no header, no forms."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.most_bytes = 4 * num_elements(spec)

    def initial_state(self) -> Arrays:
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        return b"".join(update[t.name].tobytes() for t in self.spec), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        values = np.frombuffer(payload, np.float32)
        ends = np.cumsum([t.size for t in self.spec])[:-1]
        parts = zip(self.spec, np.split(values, ends), strict=True)
        return {t.name: part.reshape(t.shape) for t, part in parts}, state


@pytest.fixture
def no_cached_runtime() -> Iterator[None]:
    runtime._built.cache_clear()
    yield
    runtime._built.cache_clear()


@pytest.mark.usefixtures("no_cached_runtime")
def test_identity_codec_is_the_codec_bypassed_bit_for_bit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    through_codec = (run(*FEDAVG) / "student" / "model.safetensors").read_bytes()
    runtime._built.cache_clear()
    monkeypatch.setattr(IdentityOptions, "build", lambda self, spec: NoCodec(spec))
    bypassed = (run(*FEDAVG) / "student" / "model.safetensors").read_bytes()
    assert through_codec == bypassed


def test_identity_codec_comes_close_to_plain_flower_fedavg(run: Run) -> None:
    # Adam divides by the gradient's size, so it would blow rounding up; SGD shows the averaging alone.
    plain_sgd = (*FEDAVG, "algorithm.optimizer.name=sgd", "algorithm.optimizer.learning_rate=0.1")
    experiment = small(*plain_sgd)
    built = runtime.runtime_of(experiment)

    def plain_client(message: Message, context: Context) -> Message:
        partition_id = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])  # type: ignore[index,arg-type,call-overload]
        weights = {name: array.numpy() for name, array in message.content["arrays"].items()}  # type: ignore[union-attr]
        data = built.task.client_data(partition_id)
        seed = derive_seed(experiment.seed, "client", number, f"{partition_id:05d}")
        trained = built.algorithm.client.train(weights, {}, data, Assignment(0.0, seed))
        assert trained.upload is not None
        moved = {name: weights[name] + change for name, change in trained.upload.items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": _record(moved), "metrics": metrics}), reply_to=message)

    with task_identity():
        grid = LocalGrid(plain_client, [{"partition-id": i} for i in range(3)], {})
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        result = strategy.start(grid, _record(built.initial), num_rounds=experiment.num_rounds)
    ours = read_arrays(ViTForImageClassification.from_pretrained(run(*plain_sgd) / "student"))
    assert not np.allclose(ours["classifier.weight"], built.initial["classifier.weight"], atol=1e-3)
    for name, array in result.arrays.items():
        np.testing.assert_allclose(array.numpy(), ours[name], atol=1e-5)


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})
