import pytest
import torch
from torch import Tensor, nn

from fedkd_flwr.core.protocols import ClientData
from fedkd_flwr.tasks.base import RecentClients, TensorExamples, copy_shared_tensors


def ids(examples: TensorExamples, batch_size: int, seed: int | None = None) -> list[int]:
    return [int(i) for batch in examples.batches(batch_size, seed) for i in batch["id"]]


def numbered(count: int) -> TensorExamples:
    return TensorExamples({"id": torch.arange(count), "double": 2 * torch.arange(count)})


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_batches_hold_every_example_once_in_order_without_a_seed(batch_size: int) -> None:
    assert ids(numbered(10), batch_size) == list(range(10))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_a_seed_shuffles_and_keeps_every_example(batch_size: int) -> None:
    shuffled = ids(numbered(10), batch_size, seed=5)
    assert shuffled != list(range(10))
    assert sorted(shuffled) == list(range(10))


def test_the_same_seed_is_the_same_order_and_another_is_another() -> None:
    assert ids(numbered(50), 8, seed=1) == ids(numbered(50), 8, seed=1) != ids(numbered(50), 8, seed=2)


def test_only_the_last_batch_is_smaller() -> None:
    assert [len(batch["id"]) for batch in numbered(10).batches(4, seed=0)] == [4, 4, 2]


def test_the_tensors_of_an_example_stay_together() -> None:
    for batch in numbered(20).batches(6, seed=3):
        assert torch.equal(batch["double"], 2 * batch["id"])


def test_drawing_batches_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    ids(numbered(10), 4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_takes_over_what_agrees_in_name_and_shape_only() -> None:
    source = nn.ModuleDict({"same": nn.Linear(2, 2), "wider": nn.Linear(4, 2), "extra": nn.Linear(2, 2)})
    target = nn.ModuleDict({"same": nn.Linear(2, 2), "wider": nn.Linear(3, 2), "own": nn.Linear(2, 2)})
    before: dict[str, Tensor] = {name: value.clone() for name, value in target.state_dict().items()}
    copy_shared_tensors(source, target)
    after = target.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"same.weight", "same.bias", "wider.bias"}
    assert all(torch.equal(after[name], source.state_dict()[name]) for name in changed)


def test_the_copy_does_not_share_storage_with_its_source() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    copy_shared_tensors(source, target)
    with torch.no_grad():
        source.weight.zero_()
    assert target.weight.any()


def asked_for(clients: list[int], limit: int, size: int) -> list[int]:
    """Which of the clients had to be made when they were asked for in this order."""
    recent, made = RecentClients(limit), []

    def make(client: int) -> tuple[ClientData, int]:
        made.append(client)
        return ClientData(numbered(client + 1), numbered(1)), size

    for client in clients:
        assert len(recent.get(client, lambda client=client: make(client)).train) == client + 1  # type: ignore[misc]
    return made


def test_clients_that_fit_are_made_once() -> None:
    assert asked_for([0, 1, 2, 0, 1, 2], limit=30, size=10) == [0, 1, 2]


def test_the_client_not_asked_for_longest_makes_room() -> None:
    assert asked_for([0, 1, 0, 2, 0, 1], limit=20, size=10) == [0, 1, 2, 1]


def test_a_client_larger_than_the_limit_is_kept_until_the_next() -> None:
    assert asked_for([0, 0, 1, 1, 0], limit=5, size=10) == [0, 1, 0]
