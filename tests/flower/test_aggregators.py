"""Every aggregator about zero, against the formula in float64."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from fedkd_flwr.algorithms.base import Aggregator
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.aggregators import STRATEGIES, build_aggregator
from fedkd_flwr.flower.archive import Archive, read_archive, write_archive
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.server_options import ServerOptions
from tests.conftest import small
from tests.flower.test_aggregation import exchange_of, give

Vector = NDArray[np.float64]
Oracle = Callable[[Sequence["Round"]], list[Vector]]  # the aggregate of every round

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (4,), "scale": ()}  # not in the order of the alphabet
ETA, TAU, BETA_1, BETA_2, MOMENTUM = 0.05, 1e-3, 0.8, 0.95, 0.7
NO_NOISE = 1e-30  # far below what float32 shows
NAMES = ["fedavg", "dp_fixed_clipping", *STRATEGIES]


@pytest.fixture(autouse=True)
def as_a_server() -> Iterator[None]:
    """A strategy writes messages, and Flower asks on whose behalf."""
    with task_identity():
        yield


class Round:
    """Uploads of one round, with what their clients say of themselves."""

    def __init__(self, seed: int, num_clients: int) -> None:
        rng = np.random.default_rng(seed)
        draw = {name: rng.standard_normal((num_clients, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
        self.uploads: list[dict[str, Array]] = [
            {name: np.asarray(values[client]) for name, values in draw.items()} for client in range(num_clients)
        ]
        self.num_examples = [int(n) for n in rng.integers(1, 50, num_clients)]
        self.losses = [float(loss) for loss in rng.uniform(0.1, 3.0, num_clients)]

    @property
    def matrix(self) -> Vector:
        return np.stack([flat(upload) for upload in self.uploads])

    def mean(self, weighting: str = "uniform") -> Vector:
        weights = self.num_examples if weighting == "num_examples" else None
        return np.average(self.matrix, axis=0, weights=weights)


def flat(arrays: Arrays) -> Vector:
    return np.concatenate([np.ravel(arrays[name]).astype(np.float64) for name in SHAPES])


def rounds(num_clients: int = 7, count: int = 3) -> list[Round]:
    return [Round(seed, num_clients) for seed in range(count)]


def built(name: str, **options: Any) -> Aggregator:
    needs_eta = {"fedavgm", "fedadam", "fedyogi", "fedadagrad"}
    needed: dict[str, Any] = {"eta": ETA} if name in needs_eta else {}
    if name == "dp_fixed_clipping":
        needed = {"clipping_norm": 1e3, "noise_multiplier": NO_NOISE}
    return build_aggregator(
        ServerOptions.model_validate({"aggregator": {"name": name} | needed | options}).aggregator,
    )


def taken(aggregator: Aggregator, number: int, of_round: Round) -> Arrays:
    aggregator.begin(number)
    for upload, num_examples, loss in zip(of_round.uploads, of_round.num_examples, of_round.losses, strict=True):
        aggregator.add(upload, num_examples, loss)
    result = aggregator.result()
    assert result is not None
    return result


def driven(aggregator: Aggregator, of_rounds: Sequence[Round], first: int = 1) -> list[Arrays]:
    return [taken(aggregator, number, of_round) for number, of_round in enumerate(of_rounds, first)]


def mean(weighting: str) -> Oracle:
    return lambda of_rounds: [of_round.mean(weighting) for of_round in of_rounds]


def momentum(weighting: str) -> Oracle:
    def oracle(of_rounds: Sequence[Round]) -> list[Vector]:
        velocity: Any = 0.0
        found = []
        for of_round in of_rounds:
            velocity = MOMENTUM * velocity + of_round.mean(weighting)
            found.append(ETA * velocity)
        return found

    return oracle


def adaptive(second: Callable[[Any, Vector], Vector], beta_1: float, *, corrected: bool) -> Callable[[str], Oracle]:
    def weighted(weighting: str) -> Oracle:
        def oracle(of_rounds: Sequence[Round]) -> list[Vector]:
            m: Any = 0.0
            v: Any = 0.0
            found = []
            for number, of_round in enumerate(of_rounds, 1):
                delta = of_round.mean(weighting)
                m = beta_1 * m + (1 - beta_1) * delta
                v = second(v, delta**2)
                # Flower counts one round more than Kingma and Ba do.
                rate = np.sqrt(1 - BETA_2 ** (number + 1)) / (1 - BETA_1 ** (number + 1)) if corrected else 1.0
                found.append(ETA * rate * m / (np.sqrt(v) + TAU))
            return found

        return oracle

    return weighted


adam = adaptive(lambda v, squared: BETA_2 * v + (1 - BETA_2) * squared, BETA_1, corrected=True)
yogi = adaptive(lambda v, squared: v - (1 - BETA_2) * squared * np.sign(v - squared), BETA_1, corrected=False)
adagrad = adaptive(lambda v, squared: v + squared, 0.0, corrected=False)


def median(of_rounds: Sequence[Round]) -> list[Vector]:
    return [np.median(of_round.matrix, axis=0) for of_round in of_rounds]


def trimmed(of_rounds: Sequence[Round], beta: float = 0.3) -> list[Vector]:
    found = []
    for of_round in of_rounds:
        cut = int(beta * len(of_round.uploads))
        found.append(np.sort(of_round.matrix, axis=0)[cut : len(of_round.uploads) - cut].mean(axis=0))
    return found


def ranked(matrix: Vector, num_malicious: int) -> list[int]:
    """Clients by the sum of squared distances to their n - f - 2 nearest, least first."""
    nearest = len(matrix) - num_malicious - 2
    scores = []
    for i, row in enumerate(matrix):
        others = sorted(((row - other) ** 2).sum() for j, other in enumerate(matrix) if j != i)
        scores.append(sum(others[:nearest]))
    return sorted(range(len(matrix)), key=scores.__getitem__)


def krum(of_rounds: Sequence[Round]) -> list[Vector]:
    return [of_round.matrix[ranked(of_round.matrix, 1)[0]] for of_round in of_rounds]


def multikrum(weighting: str, num_selected: int) -> Oracle:
    def oracle(of_rounds: Sequence[Round]) -> list[Vector]:
        found = []
        for of_round in of_rounds:
            best = ranked(of_round.matrix, 1)[:num_selected]
            weights = np.array(of_round.num_examples)[best] if weighting == "num_examples" else None
            found.append(np.average(of_round.matrix[best], axis=0, weights=weights))
        return found

    return oracle


def bulyan(of_rounds: Sequence[Round]) -> list[Vector]:
    found = []
    for of_round in of_rounds:
        theta = len(of_round.uploads) - 2
        chosen = of_round.matrix[ranked(of_round.matrix, 1)[:theta]]
        nearest = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0)[: theta - 2]
        found.append(np.take_along_axis(chosen, nearest, axis=0).mean(axis=0))
    return found


def qfedavg(q: float, rate: float) -> Oracle:
    """Li et al. 2020, algorithm 2, about w = 0: L is 1 / rate."""

    def oracle(of_rounds: Sequence[Round]) -> list[Vector]:
        found = []
        for of_round in of_rounds:
            losses = np.array(of_round.losses)
            steps = -of_round.matrix / rate
            deltas = losses[:, None] ** q * steps
            h = q * losses ** (q - 1) * (steps**2).sum(axis=1) + losses**q / rate
            found.append(-deltas.sum(axis=0) / h.sum())
        return found

    return oracle


def clipped_mean(most: float) -> Oracle:
    def of(of_rounds: Sequence[Round]) -> list[Vector]:
        return [np.mean([row * min(1.0, most / np.linalg.norm(row)) for row in r.matrix], axis=0) for r in of_rounds]

    return of


MOMENTS = {"beta_1": BETA_1, "beta_2": BETA_2, "tau": TAU}


@pytest.mark.parametrize(
    ("name", "options", "oracle"),
    [
        ("fedavg", {}, mean("uniform")),
        ("fedavg", {"weighting": "num_examples"}, mean("num_examples")),
        ("fedavgm", {"momentum": MOMENTUM}, momentum("uniform")),
        ("fedavgm", {"momentum": MOMENTUM, "weighting": "num_examples"}, momentum("num_examples")),
        ("fedadam", MOMENTS, adam("uniform")),
        ("fedadam", MOMENTS | {"weighting": "num_examples"}, adam("num_examples")),
        ("fedyogi", MOMENTS, yogi("uniform")),
        ("fedyogi", MOMENTS | {"weighting": "num_examples"}, yogi("num_examples")),
        ("fedadagrad", {"tau": TAU}, adagrad("uniform")),
        ("fedadagrad", {"tau": TAU, "weighting": "num_examples"}, adagrad("num_examples")),
        ("dp_fixed_clipping", {}, mean("uniform")),
        ("dp_fixed_clipping", {"clipping_norm": 2.0}, clipped_mean(2.0)),
        ("fedmedian", {}, median),
        ("fedtrimmedavg", {"beta": 0.3}, trimmed),
        ("krum", {}, krum),
        ("multikrum", {}, multikrum("uniform", 6)),
        ("multikrum", {"num_nodes_to_select": 3, "weighting": "num_examples"}, multikrum("num_examples", 3)),
        ("multikrum", {"num_nodes_to_select": 50}, multikrum("uniform", 7)),
        ("bulyan", {}, bulyan),
        ("qfedavg", {"q": 0.0}, mean("uniform")),
        ("qfedavg", {"q": 0.5, "client_learning_rate": 0.2}, qfedavg(0.5, 0.2)),
        ("qfedavg", {"q": 2.0, "client_learning_rate": 0.05}, qfedavg(2.0, 0.05)),
    ],
)
def test_an_aggregate_is_what_the_formula_says(name: str, options: dict[str, Any], oracle: Oracle) -> None:
    of_rounds = rounds()
    found = driven(built(name, **options), of_rounds)
    for aggregate, expected in zip(found, oracle(of_rounds), strict=True):
        np.testing.assert_allclose(flat(aggregate), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_aggregate_is_float32_in_the_uploads_own_shapes_and_leaves_them_as_they_were(name: str) -> None:
    of_round, same = Round(0, 7), Round(0, 7)
    aggregate = taken(built(name), 1, of_round)
    assert {key: np.shape(value) for key, value in aggregate.items()} == SHAPES
    assert all(isinstance(value, np.ndarray) and value.dtype == np.float32 for value in aggregate.values())
    for upload, before in zip(of_round.uploads, same.uploads, strict=True):
        assert all(np.array_equal(upload[key], before[key]) for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_aggregator_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    of_rounds = rounds()
    straight = driven(built(name), of_rounds)
    first, path = built(name), tmp_path / "state"
    driven(first, of_rounds[:1])
    write_archive(path, "state", Archive({}, first.state()))
    for state in (first.state(), read_archive(path, "state").arrays):
        second = built(name)
        second.restore(state)
        for aggregate, expected in zip(driven(second, of_rounds[1:], first=2), straight[1:], strict=True):
            assert all(np.array_equal(aggregate[key], expected[key]) for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_that_is_undone_leaves_no_trace(name: str) -> None:
    of_rounds = rounds()
    aggregator = built(name)
    driven(aggregator, of_rounds[:1])
    before = aggregator.state()
    taken(aggregator, 2, Round(9, 7))
    aggregator.restore(before)
    undone, expected = taken(aggregator, 2, of_rounds[1]), driven(built(name), of_rounds[:2])[1]
    assert all(np.array_equal(undone[key], expected[key]) for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_the_uploads_of_a_round_that_was_given_up_are_forgotten(name: str) -> None:
    aggregator = built(name)
    aggregator.begin(1)
    aggregator.add(Round(9, 1).uploads[0], 3, 1.0)
    aggregate, expected = taken(aggregator, 1, Round(0, 7)), taken(built(name), 1, Round(0, 7))
    assert all(np.array_equal(aggregate[key], expected[key]) for key in SHAPES)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"fedavgm", "fedadam", "fedyogi", "fedadagrad"}))
def test_a_rule_without_moments_has_no_state_and_gives_the_same_for_the_same_uploads(name: str) -> None:
    aggregator = built(name)
    first, second = driven(aggregator, [Round(0, 7), Round(0, 7)])
    assert all(np.array_equal(first[key], second[key]) for key in SHAPES)
    assert aggregator.state() == {}


def test_a_servers_noise_has_the_deviation_of_the_bound_over_the_uploads() -> None:
    deviation = 0.5 * 2.0 / 7
    silent = flat(taken(built("dp_fixed_clipping", clipping_norm=2.0), 1, Round(0, 7)))
    aggregator = built("dp_fixed_clipping", clipping_norm=2.0, noise_multiplier=0.5)
    noise = np.concatenate([flat(taken(aggregator, 1, Round(0, 7))) - silent for _ in range(100)])
    assert noise.std() == pytest.approx(deviation, rel=0.1)
    assert abs(noise.mean()) < 5 * deviation / len(noise) ** 0.5


def test_a_servers_noise_is_not_that_of_a_generator_that_somebody_has_seeded() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        aggregator = built("dp_fixed_clipping", clipping_norm=2.0, noise_multiplier=0.5)
        drawn.append(flat(taken(aggregator, 1, Round(0, 7))))
    assert not np.isclose(*drawn).any()


def test_momentum_is_of_the_uploads_and_not_of_former_aggregates() -> None:
    of_round = Round(0, 3)
    for decay, factors in ((0.0, (1, 1, 1)), (0.5, (1, 1.5, 1.75))):
        found = driven(built("fedavgm", momentum=decay), [of_round] * 3)
        for aggregate, factor in zip(found, factors, strict=True):
            np.testing.assert_allclose(flat(aggregate), ETA * factor * of_round.mean(), rtol=1e-5, atol=1e-7)


def test_an_update_of_zeros_does_not_take_the_round_with_it() -> None:
    """Flower divides by its norm."""
    clipped = built("dp_fixed_clipping", clipping_norm=2.0)
    uploads = Round(0, 7).uploads[:2]
    clipped.begin(1)
    for upload in (*uploads, {name: np.zeros_like(value) for name, value in uploads[0].items()}):
        clipped.add(upload, 1, None)
    result = clipped.result()
    assert result is not None
    scales = [min(1.0, 2.0 / np.sqrt(sum(np.square(value).sum() for value in each.values()))) for each in uploads]
    for name, value in result.items():
        expected = sum(scale * each[name] for scale, each in zip(scales, uploads, strict=True)) / 3
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_momentum_zero_at_rate_one_is_the_mean() -> None:
    aggregate = taken(built("fedavgm", eta=1.0, momentum=0.0), 1, Round(0, 5))
    np.testing.assert_allclose(flat(aggregate), Round(0, 5).mean(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"])
def test_one_huge_upload_does_not_move_a_robust_rule_far(name: str) -> None:
    of_round = Round(0, 7)
    honest = max(float(np.abs(row).max()) for row in of_round.matrix)
    of_round.uploads[3] = {key: np.full(shape, 1e6, np.float32) for key, shape in SHAPES.items()}
    assert np.abs(flat(taken(built(name), 1, of_round))).max() <= honest


@pytest.mark.parametrize("num_uploads", [1, 6])
def test_bulyan_of_too_few_uploads_is_none_and_a_later_round_is_not_harmed(num_uploads: int) -> None:
    aggregator = built("bulyan")
    aggregator.begin(1)
    for upload in Round(0, num_uploads).uploads:
        aggregator.add(upload, 1, None)
    assert aggregator.result() is None
    np.testing.assert_allclose(flat(taken(aggregator, 2, Round(1, 7))), bulyan([Round(1, 7)])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bulyan"}))
@pytest.mark.parametrize("num_uploads", [1, 2])
def test_every_other_rule_gives_a_result_for_the_fewest_uploads(name: str, num_uploads: int) -> None:
    assert np.isfinite(flat(taken(built(name), 1, Round(0, num_uploads)))).all()


def test_a_client_without_a_loss_is_refused_only_where_the_loss_is_needed() -> None:
    upload = Round(0, 1).uploads[0]
    for name in NAMES:
        aggregator = built(name)
        aggregator.begin(1)
        if name == "qfedavg":
            with pytest.raises(MessageError, match="must be at least 0, got None"):
                aggregator.add(upload, 1, None)
        else:
            aggregator.add(upload, 1, None)


def test_a_negative_loss_is_refused_before_it_spoils_the_aggregate() -> None:
    aggregator = built("qfedavg")
    aggregator.begin(1)
    with pytest.raises(MessageError, match="must be at least 0, got -1"):
        aggregator.add(Round(0, 1).uploads[0], 1, -1.0)


def test_a_loss_of_zero_is_a_loss() -> None:
    aggregator = built("qfedavg")
    aggregator.begin(1)
    aggregator.add(Round(0, 1).uploads[0], 1, 0.0)
    assert aggregator.result() is not None


def test_a_reply_without_the_loss_that_is_needed_costs_that_reply_only(tmp_path: Path) -> None:
    exchange, runtime = exchange_of(nn.Linear(2, 1), tmp_path, "server.aggregator.name=qfedavg")
    assert runtime.wires is not None
    assert exchange._merger is not None
    update = {t.name: np.ones(t.shape, np.float32) for t in runtime.wires.uplink.spec}
    give(exchange, runtime, "a", 1, update)
    assert exchange._merger.take(exchange._round, exchange._reject) == 0
    assert [rejection.client for rejection in exchange._round.rejected] == ["a"]


# Options


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_a_server_optimiser_without_a_rate_is_refused(name: str) -> None:
    for override in (f"server.aggregator={{name: {name}}}", f"server.aggregator.name={name}"):
        with pytest.raises(ConfigError) as caught:
            small(override)
        assert str(caught.value) == "server.aggregator.eta: required, got nothing"


def test_an_aggregator_is_changed_by_its_name_and_keeps_the_options_that_both_know() -> None:
    weighted = "server.aggregator.weighting=num_examples"
    five = "num_clients=5"
    assert small(five, "server.aggregator.name=krum").server.aggregator.model_dump() == {
        "name": "krum",
        "num_malicious_nodes": 1,
    }
    assert small(five, weighted, "server.aggregator.name=krum").server.aggregator.name == "krum"
    kept = small(five, weighted, "server.aggregator.name=multikrum").server.aggregator.model_dump()
    assert (kept["name"], kept["weighting"]) == ("multikrum", "num_examples")
    overrides = ("server.aggregator.name=fedadam", "server.aggregator.eta=0.1")
    assert small(*overrides).server.aggregator.model_dump()["eta"] == 0.1


def test_an_option_of_another_aggregator_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        small("server.aggregator.eta=0.1")
    assert str(caught.value) == "server.aggregator.eta: unknown key; allowed: name, weighting"


def test_every_aggregator_of_the_options_can_be_built() -> None:
    wanted = "'fedavg', 'fedavgm', 'fedadam', 'fedyogi', 'fedadagrad', 'dp_fixed_clipping', 'fedmedian', "
    with pytest.raises(ConfigError) as caught:
        small("server.aggregator.name=median")
    allowed = str(caught.value).removeprefix("server.aggregator.name: must be one of ").split(", got")[0]
    assert allowed.startswith(wanted)
    assert {name.strip("'") for name in allowed.split(", ")} == set(NAMES)


def test_a_client_cannot_weigh_more_by_claiming_an_absurd_loss() -> None:
    honest, absurd = built("qfedavg"), built("qfedavg")
    uploads = Round(0, 4).uploads
    for aggregator, claimed in ((honest, 10.0), (absurd, 1e300)):
        aggregator.begin(1)
        for upload, loss in zip(uploads, (1.0, 1.0, 1.0, claimed), strict=True):
            aggregator.add(upload, 1, loss)
    first, second = honest.result(), absurd.result()
    assert first is not None and second is not None
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_of_two_clients_the_smaller_loss_bounds_the_other() -> None:
    honest, absurd = built("qfedavg"), built("qfedavg")
    uploads = Round(0, 2).uploads
    for aggregator, claimed in ((honest, 10.0), (absurd, 1e300)):
        aggregator.begin(1)
        for upload, loss in zip(uploads, (1.0, claimed), strict=True):
            aggregator.add(upload, 1, loss)
    first, second = honest.result(), absurd.result()
    assert first is not None and second is not None
    assert all(np.array_equal(first[name], second[name]) for name in first)
