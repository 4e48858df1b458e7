"""Federated reinforcement distillation: what agents gather, send, average and distil."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import client_app
from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.frd import FrdOptions, MixFrdOptions, mixed
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions
from fedkd_flwr.algorithms.proxy_memory import POLICIES, VISITED, ProxyMemory, ProxyMemoryCodec, ProxyMemoryMean
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.entropy_coding import BitWriter, write_flags
from fedkd_flwr.core.losses import soft_cross_entropy
from fedkd_flwr.core.proxy_states import ProxyGrid
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.experiment import ConfigError, Experiment, load, parse
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from fedkd_flwr.tasks import TASKS
from tests.algorithms.conftest import same, under
from tests.conftest import ROOT

pytest.importorskip("gymnasium")

TASK = TASKS["cartpole"].model_validate({"episodes": 2, "test_episodes": 2, "teacher": 16, "student": 8}).build(2, 0)
LOCAL = LocalTraining(num_epochs=1, batch_size=1)
ADAM = OptimizerOptions(learning_rate=0.003)
SMALL = """
name: little_pole
num_clients: 3
num_rounds: 3
task: {name: cartpole, episodes: 2, test_episodes: 3, teacher: 16, student: 8, proxies: [1, 3, 4, 3]}
algorithm: {name: frd, local: {num_epochs: 1, batch_size: 1}}
"""


def memory(rows: list[list[float] | None]) -> dict[str, Array]:
    return {
        POLICIES: np.array([row or [0.0, 0.0] for row in rows], np.float32),
        VISITED: np.array([row is not None for row in rows], np.float32),
    }


def mean_of(*uploads: Arrays) -> Arrays:
    rule = ProxyMemoryMean()
    rule.begin(1)
    for upload in uploads:
        rule.add(upload, 1, None)
    result = rule.result()
    assert result is not None
    return result


def test_the_mean_is_over_the_agents_that_visited_each_state_all_alike() -> None:
    means = mean_of(memory([[0.2, 0.8], [1.0, 0.0], None]), memory([[0.6, 0.4], None, None]))
    np.testing.assert_allclose(means[POLICIES], [[0.4, 0.6], [1.0, 0.0], [0.0, 0.0]], atol=1e-7)
    assert means[VISITED].tolist() == [1, 1, 0]


def test_a_policy_is_averaged_over_all_visits_of_a_round() -> None:
    gathered = ProxyMemory(ProxyGrid([(0.0, 3.0)], [3]), num_actions=2)
    logits = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]).log()
    gathered.add(torch.tensor([[0.1], [0.9]]), logits[:2])
    gathered.add(torch.tensor([[0.5], [2.5]]), logits[[2, 0]])
    found = gathered.means()
    np.testing.assert_allclose(found[POLICIES], [[17 / 30, 13 / 30], [0, 0], [0.9, 0.1]], atol=1e-6)
    assert found[VISITED].tolist() == [1, 0, 1]


@settings(max_examples=50, deadline=None)
@given(
    visited=st.lists(st.booleans(), min_size=1, max_size=40),
    actions=st.integers(2, 4),
    bits=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_what_is_packed_is_unpacked_and_takes_what_the_formula_says(
    visited: list[bool], actions: int, bits: int, seed: int
) -> None:
    flags = np.array(visited)
    policies = np.random.default_rng(seed).dirichlet(np.ones(actions), len(flags)) * flags[:, None]
    update = {POLICIES: policies.astype(np.float32), VISITED: flags.astype(np.float32)}
    codec = ProxyMemoryCodec(len(flags), actions, bits)
    payload, _ = codec.encode(update, {}, progress=0.0, seed=0)
    writer = BitWriter()
    write_flags(flags, writer)
    flag_bits = sum(len(part) for part in writer._parts)
    assert len(payload) == -(-(flag_bits + int(flags.sum()) * (actions - 1) * bits) // 8)
    found, _ = codec.decode(payload, {})
    assert found[VISITED].tolist() == update[VISITED].tolist()
    np.testing.assert_allclose(found[POLICIES], policies, atol=1 / (2**bits - 1) + 1e-6)
    np.testing.assert_allclose(found[POLICIES].sum(1), flags, atol=1e-6)


def test_a_hostile_payload_is_an_error_or_probabilities() -> None:
    codec = ProxyMemoryCodec(20, 3, 8)
    rng = np.random.default_rng(0)
    visited = rng.random(20) < 0.5
    policies = rng.dirichlet(np.ones(3), 20) * visited[:, None]
    honest, _ = codec.encode({POLICIES: policies, VISITED: visited.astype(np.float32)}, {}, progress=0.0, seed=0)
    read = 0
    for _ in range(500):
        data = bytearray(honest)
        data[rng.integers(len(data))] = rng.integers(256)
        cut = bytes(data[: rng.integers(len(data) + 1)]) if rng.random() < 0.3 else bytes(data)
        try:
            found, _ = codec.decode(cut, {})
        except ValueError:
            continue
        read += 1
        assert (found[POLICIES] >= 0).all()
        np.testing.assert_allclose(found[POLICIES].sum(1), found[VISITED], atol=1e-6)
    assert read > 0


def test_the_distillation_loss_is_what_float64_says() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(5, 2)), rng.dirichlet(np.ones(2), 5)
    expected = -np.mean([(p * (z - np.log(np.exp(z).sum()))).sum() for z, p in zip(logits, targets, strict=True)])
    found = soft_cross_entropy(torch.tensor(logits), torch.tensor(targets), torch.ones(5))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_states_and_policies_are_mixed_by_the_same_share() -> None:
    rows = torch.tensor([[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]])
    found = mixed(rows, torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.25], [0.5]]))
    assert found.tolist() == [[3.0, 4.0], [4.0, 5.0]]


@pytest.mark.parametrize("options", [FrdOptions, MixFrdOptions])
def test_a_policy_moves_towards_the_memory_before_it_acts(options: type[FrdOptions]) -> None:
    rate = OptimizerOptions(learning_rate=0.01)
    still = OptimizerOptions(name="sgd", learning_rate=1e-30)  # so that acting changes nothing
    algorithm = options(local=LOCAL, optimizer=still, distillation_optimizer=rate, distillation_steps=100).build(
        TASK, 0
    )
    data = TASK.client_data(0)
    policies = np.tile(np.array([0.9, 0.1], np.float32), (len(TASK.proxies), 1))
    shared = {POLICIES: policies, VISITED: np.ones(len(policies), np.float32)}
    private = algorithm.client.initial_private(data)
    trained = algorithm.client.train(shared, private, data, Assignment(0.0, 1))
    assert trained.upload is not None
    visited = trained.upload[VISITED] > 0
    np.testing.assert_allclose(trained.upload[POLICIES][visited], policies[visited], atol=0.02)
    assert same(under("model/critic", trained.private), under("model/critic", private))  # a memory says nothing of it


@pytest.mark.parametrize("options", [FrdOptions, MixFrdOptions])
def test_one_step_of_distillation_is_that_of_the_equation(options: type[FrdOptions]) -> None:
    """Against autograd on -sum_a p(a) log pi(a | s), over proxies, and pairs of neighbours mixed by one share each."""
    rate, seed = 0.05, 3
    still = OptimizerOptions(name="sgd", learning_rate=1e-30)  # so that acting changes nothing
    one_step = OptimizerOptions(name="sgd", learning_rate=rate)
    algorithm = options(local=LOCAL, optimizer=still, distillation_optimizer=one_step, distillation_steps=1).build(
        TASK, 0
    )
    data, grid = TASK.client_data(0), TASK.proxies
    rng = np.random.default_rng(0)
    visited = rng.random(len(grid)) < 0.6
    policies = (rng.dirichlet(np.ones(2), len(grid)) * visited[:, None]).astype(np.float32)
    shared = {POLICIES: policies, VISITED: visited.astype(np.float32)}
    private = algorithm.client.initial_private(data)
    trained = algorithm.client.train(shared, private, data, Assignment(0.0, seed))

    module = algorithm.client.model(private, data)  # type: ignore[attr-defined]
    states, targets = grid.centres[visited], torch.from_numpy(policies)[visited]
    if options is MixFrdOptions:
        pairs = grid.neighbours(torch.from_numpy(visited))
        assert len(pairs) > 0
        draw = torch.Generator().manual_seed(derive_seed(seed, "mix"))
        share = torch.rand(len(pairs), 1, generator=draw)
        one, other = pairs.T
        states = torch.cat([states, share * grid.centres[one] + (1 - share) * grid.centres[other]])
        rows = torch.from_numpy(policies)
        targets = torch.cat([targets, share * rows[one] + (1 - share) * rows[other]])
    log_pi = TASK.policy(module, states).log_softmax(dim=-1)
    (-(targets * log_pi).sum(dim=1).mean()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        step = 0 if parameter.grad is None else rate * parameter.grad
        expected = (parameter - step).detach().numpy()
        np.testing.assert_allclose(under("model/", trained.private)[name], expected, atol=1e-6)


@pytest.mark.parametrize("keep_moments", [True, False])
def test_moments_are_kept_where_asked_for(keep_moments: bool) -> None:
    algorithm = FrdOptions(local=LOCAL, optimizer=ADAM, keep_moments=keep_moments).build(TASK, 0)
    data, shared = TASK.client_data(0), algorithm.shared.initial()
    first = algorithm.client.train(shared, algorithm.client.initial_private(data), data, Assignment(0.0, 1)).private
    forgotten = {name: value for name, value in first.items() if not name.startswith("optimizer/")}
    assert (len(forgotten) < len(first)) == keep_moments
    second, afresh = (
        algorithm.client.train(shared, kept, data, Assignment(0.5, 2)).private for kept in (first, forgotten)
    )
    assert same(under("model/", second), under("model/", afresh)) != keep_moments


def test_without_a_memory_agents_learn_as_they_would_alone() -> None:
    frd = FrdOptions(local=LOCAL, optimizer=ADAM).build(TASK, 0)
    alone = LocalOnlyOptions(local=LOCAL, optimizer=ADAM).build(TASK, 0)
    data, first = TASK.client_data(0), Assignment(0.0, 5)
    found = frd.client.train(frd.shared.initial(), frd.client.initial_private(data), data, first)
    expected = alone.client.train({}, alone.client.initial_private(data), data, first)
    assert same(under("model/", found.private), under("model/", expected.private))


@pytest.mark.parametrize("name", ["frd", "mixfrd"])
def test_a_run_moves_a_hundred_bytes_a_round_and_resumes_to_the_same(name: str, tmp_path: Path) -> None:
    def experiment(*overrides: str) -> Experiment:
        return parse(SMALL, (f"algorithm.name={name}", *overrides))

    straight = run_in_process(experiment(), client_app.app, tmp_path / "straight")
    resumed = tmp_path / "resumed"
    run_in_process(experiment("num_rounds=2"), client_app.app, resumed)
    run_in_process(experiment(), client_app.app, resumed, resume=True, force=True)
    finals = []
    for run_dir in (straight, resumed):
        rows = list(read_rows(run_dir / LEDGER_FILE))
        sent = [r for r in rows if r["kind"] == "message" and (r["purpose"], r["direction"]) == ("train", "uplink")]
        assert len(sent) == 9
        assert all(0 < row["payload_bytes"] <= -(-(6 + 36 * 2 + 36 * 8) // 8) for row in sent)
        finals.append([row for row in rows if row["kind"] == "final"][-1]["metrics"])
    assert finals[0] == finals[1]
    assert finals[0]["private_local"]["mean_return"] >= 1


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "local_only"])
def test_algorithms_of_one_model_learn_by_acting_too(name: str, tmp_path: Path) -> None:
    run_dir = run_in_process(parse(SMALL, (f"algorithm.name={name}", "num_rounds=1")), client_app.app, tmp_path / "run")
    [final] = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "final"]
    assert (final["metrics"]["private_local"] or final["metrics"]["shared_local"])["mean_return"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frd", "mixfrd"])
def test_agents_that_exchange_solve_the_task(name: str, tmp_path: Path) -> None:
    run_dir = run_in_process(load(ROOT / "conf" / f"cartpole_{name}.yaml"), client_app.app, tmp_path / "run")
    scores = [row["metrics"]["private_local"] for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "round"]
    assert max(of_round["mean_return"] for of_round in scores if of_round) >= 195


def test_an_algorithm_that_compares_two_models_on_a_batch_is_refused() -> None:
    experiment = parse(SMALL, ("algorithm={name: fedkd}",))
    with pytest.raises(
        ConfigError, match=r"^algorithm\.name: must be one of fedavg, .*mixfrd for cartpole.* got fedkd$"
    ):
        experiment.build_algorithm(experiment.build_task())


def test_a_task_with_data_is_refused() -> None:
    experiment = parse(SMALL, ("task={name: digits}",))
    with pytest.raises(ConfigError, match=r"^algorithm\.name: frd needs a task that is learned by acting"):
        experiment.build_algorithm(experiment.build_task())
