"""Uploads into one aggregate.

An aggregator sees decoded float32 updates about zero; an algorithm that exchanges outputs brings one of its own. The
mean is ours, one running sum, with the server's noise where that is asked for; every other rule is a Flower strategy,
wrapped: it is shown zeros as the current model and the updates as what clients trained. Moving the origin would change
what Krum chooses; a strategy also holds every update of a round at once, which the mean does not.
"""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from fedkd_flwr.algorithms.base import Aggregator
from fedkd_flwr.core.arrays import Array, Arrays, RunningMean
from fedkd_flwr.core.modules import prefixed, without_prefix
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.flower.server_noise import FixedClipping
from fedkd_flwr.server_options import (
    AdaptiveAggregation,
    AggregatorOptions,
    DpFixedClippingAggregation,
    FedAdamAggregation,
    FedAvgAggregation,
    FedAvgMAggregation,
    FedTrimmedAvgAggregation,
    FedYogiAggregation,
    KrumAggregation,
    MultiKrumAggregation,
    QFedAvgAggregation,
    RobustSelection,
)

_flower_log = logging.getLogger("flwr")
_MOST_LOSS_RATIO = 10.0  # a loss above so many medians counts as that: it is the client's own word
_FEWEST_LOSSES = 3  # of fewer the median is made of the liar's word; then the smallest one decides
_ARRAYS, _METRICS = "arrays", "metrics"
_NUM_EXAMPLES, _TRAIN_LOSS = "num-examples", "train_loss"
_FIRST_MOMENT, _SECOND_MOMENT = "first moment/", "second moment/"
# Flower's defaults would have it wait for nodes, or sample among them; the exchange has done both.
_NO_SAMPLING: Mapping[str, Any] = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}


class Mean:
    """The mean, every client alike or weighted by training examples; one sum in memory for any number of clients."""

    def __init__(self, options: FedAvgAggregation) -> None:
        self._uniform = options.weighting != "num_examples"
        self._mean = RunningMean()

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._mean = RunningMean()

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Add one upload to the sum."""
        self._mean.add(upload, 1.0 if self._uniform else float(num_examples))

    def result(self) -> Arrays | None:
        """The mean."""
        return self._mean.result()

    def state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to restore."""


class Median:
    """The median of every number, for statistics that hostile clients may have written."""

    def __init__(self) -> None:
        self._items: list[Arrays] = []

    def add(self, arrays: Arrays, weight: float) -> None:
        """Keep one item; every one counts alike."""
        self._items.append(arrays)

    def result(self) -> dict[str, Array]:
        """The median, float32."""
        names = self._items[0]
        return {name: np.median([item[name] for item in self._items], axis=0).astype(np.float32) for name in names}


class FlowerStrategy:
    """A strategy of Flower's as an aggregator.

    Args:
        make: makes the strategy for a number of uploads, which one rule needs to know.
        uniform: count every client alike.
        needs_loss: whether the strategy weighs by it.
    """

    def __init__(self, make: Callable[[int], Strategy], *, uniform: bool, needs_loss: bool) -> None:
        self._make = make
        self._uniform = uniform
        self._needs_loss = needs_loss
        self._server_round = 0
        self._uploads: list[tuple[Arrays, int, float]] = []
        self._state: Arrays = {}

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._server_round = server_round
        self._uploads = []

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Keep one upload."""
        if self._needs_loss and (loss is None or loss < 0):
            raise MessageError(f"{_TRAIN_LOSS}, which this aggregator weighs by, must be at least 0, got {loss}")
        self._uploads.append((upload, 1 if self._uniform else num_examples, loss or 0.0))

    def result(self) -> Arrays | None:
        """What the strategy makes of the uploads. It writes Flower messages, so only a process that may can do it."""
        if not self._uploads:
            raise ValueError("the aggregate of no uploads is undefined; add at least one")
        strategy: Any = self._make(len(self._uploads))
        template = self._uploads[0][0]
        _restore(strategy, self._state, list(template))
        zeros = {name: np.zeros_like(value) for name, value in template.items()}
        losses = [loss for *_, loss in self._uploads]
        most = _MOST_LOSS_RATIO * (float(np.median(losses)) if len(losses) >= _FEWEST_LOSSES else min(losses))
        replies = [_reply(upload, number, min(loss, most)) for upload, number, loss in self._uploads]
        self._uploads = []
        try:
            with _undisturbed():
                # The public way to tell a strategy the current model; the messages it writes are not needed.
                strategy.configure_train(self._server_round, _record(zeros), ConfigRecord(), cast(Grid, _Seats()))
                arrays, _ = strategy.aggregate_train(self._server_round, replies)
        except Exception as error:  # Flower's strategies raise kinds of their own, and numpy's
            raise ValueError(f"{type(strategy).__name__}: {error}") from error
        if arrays is None:
            return None
        self._state = _state(strategy, list(template))
        shapes = {name: np.shape(value) for name, value in template.items()}
        return {name: np.asarray(arrays[name].numpy(), np.float32).reshape(shape) for name, shape in shapes.items()}

    def state(self) -> Arrays:
        """The strategy's moments."""
        return self._state

    def restore(self, state: Arrays) -> None:
        """Go on with these moments."""
        self._state = state


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep a strategy from logging that it sampled one node, and from searching all memory at every upload."""
    level = _flower_log.level
    _flower_log.setLevel(logging.WARNING)
    frozen = gc.get_freeze_count() > 0
    gc.freeze()  # Flower collects garbage whenever it reads a record: a quarter of a second, with torch loaded
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        _flower_log.setLevel(level)


class _Seats:
    """All that a strategy asks of a grid when it may not choose: somebody is there."""

    def get_node_ids(self) -> Iterable[int]:
        return [1]


class _Replied:
    """All that a strategy asks of a message; a real one needs a sender."""

    def __init__(self, content: RecordDict) -> None:
        self.content = content

    def has_error(self) -> bool:
        return False


def _record(arrays: Arrays) -> ArrayRecord:
    # With one axis at least: what Flower does in place leaves a number without axes as it is.
    return ArrayRecord({name: FlowerArray(np.atleast_1d(value)) for name, value in arrays.items()})


def _reply(upload: Arrays, num_examples: int, loss: float) -> Message:
    metrics = MetricRecord({_NUM_EXAMPLES: num_examples, _TRAIN_LOSS: loss})
    return cast(Message, _Replied(RecordDict({_ARRAYS: _record(upload), _METRICS: metrics})))


def _state(strategy: Any, names: list[str]) -> dict[str, Array]:
    """Moments of a strategy that has them. Flower has no public way to read or set them."""
    if isinstance(strategy, FedAvgM):
        momentum = strategy.momentum_vector
        return prefixed(_FIRST_MOMENT, dict(zip(names, momentum, strict=True))) if momentum else {}
    if hasattr(strategy, "m_t"):
        return prefixed(_FIRST_MOMENT, strategy.m_t) | prefixed(_SECOND_MOMENT, strategy.v_t)
    return {}


def _restore(strategy: Any, state: Arrays, names: list[str]) -> None:
    if not state:
        return
    first = without_prefix(_FIRST_MOMENT, state)
    if isinstance(strategy, FedAvgM):
        strategy.momentum_vector = [first[name] for name in names]
    else:
        strategy.m_t, strategy.v_t = first, without_prefix(_SECOND_MOMENT, state)


def _fedavgm(options: FedAvgMAggregation, num_uploads: int) -> FedAvg:
    return FedAvgM(**_NO_SAMPLING, server_learning_rate=options.eta, server_momentum=options.momentum)


def _adaptive(strategy: type[FedAdam] | type[FedYogi]) -> Callable[[Any, int], FedAvg]:
    def make(options: FedAdamAggregation | FedYogiAggregation, num_uploads: int) -> FedAvg:
        return strategy(**_NO_SAMPLING, eta=options.eta, tau=options.tau, beta_1=options.beta_1, beta_2=options.beta_2)

    return make


def _fedadagrad(options: AdaptiveAggregation, num_uploads: int) -> FedAvg:
    return FedAdagrad(**_NO_SAMPLING, eta=options.eta, tau=options.tau)


def _fedmedian(options: AggregatorOptions, num_uploads: int) -> FedAvg:
    return FedMedian(**_NO_SAMPLING)


def _fedtrimmedavg(options: FedTrimmedAvgAggregation, num_uploads: int) -> FedAvg:
    return FedTrimmedAvg(**_NO_SAMPLING, beta=options.beta)


def _krum(options: KrumAggregation, num_uploads: int) -> FedAvg:
    return Krum(**_NO_SAMPLING, num_malicious_nodes=options.num_malicious_nodes)


def _multikrum(options: MultiKrumAggregation, num_uploads: int) -> FedAvg:
    selected = options.num_nodes_to_select or max(1, num_uploads - options.num_malicious_nodes)
    return MultiKrum(
        **_NO_SAMPLING, num_malicious_nodes=options.num_malicious_nodes, num_nodes_to_select=min(selected, num_uploads)
    )


def _bulyan(options: RobustSelection, num_uploads: int) -> FedAvg:
    return Bulyan(**_NO_SAMPLING, num_malicious_nodes=options.num_malicious_nodes)


def _qfedavg(options: QFedAvgAggregation, num_uploads: int) -> FedAvg:
    return QFedAvg(
        client_learning_rate=options.client_learning_rate,
        q=options.q,
        train_loss_key=_TRAIN_LOSS,
        **_NO_SAMPLING,
    )


STRATEGIES: Mapping[str, Callable[[Any, int], Strategy]] = {
    "fedavgm": _fedavgm,
    "fedadam": _adaptive(FedAdam),
    "fedyogi": _adaptive(FedYogi),
    "fedadagrad": _fedadagrad,
    "fedmedian": _fedmedian,
    "fedtrimmedavg": _fedtrimmedavg,
    "krum": _krum,
    "multikrum": _multikrum,
    "bulyan": _bulyan,
    "qfedavg": _qfedavg,
}


def build_aggregator(options: AggregatorOptions) -> Aggregator:
    """The aggregator that the options describe."""
    if isinstance(options, FedAvgAggregation):
        return Mean(options)
    if isinstance(options, DpFixedClippingAggregation):
        return FixedClipping(options)
    make = STRATEGIES[options.name]
    uniform = getattr(options, "weighting", "uniform") != "num_examples"
    needs_loss = isinstance(options, QFedAvgAggregation)
    return FlowerStrategy(
        lambda num_uploads: make(options, num_uploads),
        uniform=uniform,
        needs_loss=needs_loss,
    )


def aggregator_of(runtime: Runtime) -> Aggregator:
    """The algorithm's own rule where it has one, else the one that the user chose."""
    make = runtime.algorithm.make_aggregator
    return make() if make else build_aggregator(runtime.experiment.server.aggregator)
