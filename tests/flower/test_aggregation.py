"""From decoded uploads to the next version."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from torch import nn

from fedkd_flwr.algorithms.base import Algorithm, MeanUpdateServer, SharedModel
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import Task
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.lineage import initial_lineage
from fedkd_flwr.flower.records import HelloReply, Reply
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.measure.ledger import Ledger
from tests.conftest import small


class NoTask:
    """All that an exchange asks of a task, to whom every model is as good as any."""

    def test_data(self) -> list[None]:
        return []

    def predict(self, module: nn.Module, examples: list[None]) -> None:
        return None

    def score(self, predictions: None, examples: list[None]) -> dict[str, float]:
        return {"loss": 1.0}


def exchange_of(module: nn.Module, directory: Path, *overrides: str, **changes: Any) -> tuple[Exchange, Runtime]:
    experiment = small("compressor.name=identity", *overrides)
    task = cast(Task, NoTask())
    shared = SharedModel(task, module)
    algorithm = replace(Algorithm("updates", shared, cast(Any, None), MeanUpdateServer(shared), 1, 1), **changes)
    initial = shared.initial()
    wires = shared.wires(experiment.build_codec)
    runtime = Runtime(experiment, task, algorithm, wires, initial, initial_lineage(initial))
    return Exchange(runtime, Ledger(directory), "0" * 16, Checkpoints(directory, 1)), runtime


def give(exchange: Exchange, runtime: Runtime, key: str, num_examples: int, update: Arrays) -> None:
    assert runtime.wires is not None
    payload, _ = runtime.wires.uplink.encode(update, {}, progress=0.0, seed=0)
    node = len(exchange._round.accepted) + 10
    hello = HelloReply(key, 0, runtime.lineage, num_examples, 1, 0, 0, "all")
    exchange._roster.admit(node, hello, 0, 0, [node])
    exchange._round.accepted[key] = Reply(1, 1, 0, runtime.lineage, num_examples, 1, payload)


def advance(exchange: Exchange) -> bool:
    assert exchange._merger is not None
    exchange._merger.take(exchange._round, exchange._reject, exchange._roster.all())
    return exchange._advance(exchange._merger)


@pytest.mark.parametrize(("weighting", "moved"), [("uniform", 2.0), ("num_examples", 1.5)])
def test_parameters_are_weighted_as_asked_and_buffers_always_count_alike(
    tmp_path: Path, weighting: str, moved: float
) -> None:
    module = nn.BatchNorm1d(2)
    exchange, runtime = exchange_of(module, tmp_path, f"server.aggregator.weighting={weighting}")
    assert runtime.wires is not None
    for key, num_examples, value in (("a", 3, 1.0), ("b", 1, 3.0)):
        update = {t.name: np.full(t.shape, value, np.float32) for t in runtime.wires.uplink.spec}
        give(exchange, runtime, key, num_examples, update)
    assert advance(exchange)
    after = exchange.reference.shared
    assert np.array_equal(after["weight"] - runtime.initial["weight"], np.full(2, moved, np.float32))
    assert np.array_equal(after["running_mean"], np.full(2, 2.0, np.float32))
    assert np.array_equal(after["num_batches_tracked"], runtime.initial["num_batches_tracked"])


OUTPUTS = {"exchanges": "outputs", "weighs_claims": True}


@pytest.mark.parametrize(
    ("ratio", "moved", "changes"),
    [("3.0", 2.8, {}), ("null", 3.997, {}), ("3.0", 2.8, OUTPUTS), ("null", 3.997, OUTPUTS)],
)
def test_a_claim_of_many_examples_weighs_at_most_a_few_times_the_median(
    tmp_path: Path, ratio: str, moved: float, changes: dict[str, Any]
) -> None:
    weighting = ("server.aggregator.weighting=num_examples", f"server.validation.max_weight_ratio={ratio}")
    exchange, runtime = exchange_of(nn.Linear(2, 1), tmp_path, *weighting, **changes)
    assert runtime.wires is not None
    for key, num_examples, value in (("a", 1, 1.0), ("b", 1, 1.0), ("liar", 1998, 4.0)):
        update = {t.name: np.full(t.shape, value, np.float32) for t in runtime.wires.uplink.spec}
        give(exchange, runtime, key, num_examples, update)
    assert advance(exchange)
    assert np.allclose(exchange.reference.shared["bias"] - runtime.initial["bias"], moved, atol=1e-5)


def test_an_aggregate_that_overflows_moves_nothing(tmp_path: Path) -> None:
    exchange, runtime = exchange_of(nn.Linear(2, 1), tmp_path)
    assert runtime.wires is not None
    for step in range(2):
        exchange._round = exchange._new_round(step + 1)
        update = {t.name: np.full(t.shape, 2e38, np.float32) for t in runtime.wires.uplink.spec}
        give(exchange, runtime, "a", 1, update)
        assert advance(exchange) == (step == 0)
    assert exchange.reference.version == 1
    assert all(np.isfinite(value).all() for value in exchange.reference.shared.values())
