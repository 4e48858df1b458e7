import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedkd_flwr.tasks.partition import DirichletPartition, IidPartition, Partition, partition_indices

LABELS: list[int] = load_digits().target.tolist()
EVERY_KIND = pytest.mark.parametrize(
    "partition", [IidPartition(), DirichletPartition(alpha=0.3), DirichletPartition(alpha=100.0)], ids=str
)


def skew(labels: list[int], partition: Partition, seed: int) -> float:
    """Mean total variation between a client's label mix and everyone's, in [0, 1]."""
    everyone = np.bincount(labels) / len(labels)
    mixes = [
        np.bincount(np.array(labels)[rows], minlength=10) for rows in partition_indices(labels, partition, 5, seed)
    ]
    return float(np.mean([np.abs(mix / mix.sum() - everyone).sum() / 2 for mix in mixes]))


@EVERY_KIND
@pytest.mark.parametrize("num_clients", [1, 2, 7, 10])
def test_every_row_goes_to_exactly_one_client(partition: Partition, num_clients: int) -> None:
    clients = partition_indices(LABELS, partition, num_clients, seed=3)
    assert len(clients) == num_clients
    assert sorted(row for rows in clients for row in rows) == list(range(len(LABELS)))


@EVERY_KIND
def test_the_seed_alone_decides_the_rows(partition: Partition) -> None:
    first, again, other = (partition_indices(LABELS, partition, 4, seed) for seed in (3, 3, 4))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_another_seed_draws_other_shares_and_not_the_same_ones_of_other_rows() -> None:
    sizes = [[len(rows) for rows in partition_indices(LABELS, DirichletPartition(), 4, seed)] for seed in (3, 4)]
    assert sizes[0] != sizes[1]


@EVERY_KIND
def test_seeds_beyond_32_bits_are_taken(partition: Partition) -> None:
    rows = partition_indices(LABELS, partition, 2, seed=2**63 - 1)
    assert sum(map(len, rows)) == len(LABELS)


@pytest.mark.parametrize("num_clients", [2, 7, 10])
def test_iid_sizes_differ_by_at_most_one(num_clients: int) -> None:
    sizes = [len(rows) for rows in partition_indices(LABELS, IidPartition(), num_clients, seed=0)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_is_a_random_draw_even_where_labels_repeat_in_step_with_the_clients() -> None:
    # Dealing every 10th row out unshuffled would give each of 10 clients a single label.
    labels = [row % 10 for row in range(1000)]
    for rows in partition_indices(labels, IidPartition(), 10, seed=0):
        assert len({labels[row] for row in rows}) == 10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_smaller_alpha_skews_labels_more(seed: int) -> None:
    strong, weak, near_iid = (skew(LABELS, DirichletPartition(alpha=alpha), seed) for alpha in (0.1, 1.0, 1000.0))
    assert strong > weak + 0.1
    assert weak > near_iid + 0.1
    assert near_iid < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_no_client_of_a_dirichlet_draw_has_fewer_than_min_examples(seed: int) -> None:
    partition = DirichletPartition(alpha=0.3, min_examples=60)
    assert min(len(rows) for rows in partition_indices(LABELS, partition, 8, seed)) >= 60


@pytest.mark.parametrize(
    ("partition", "needed"), [(IidPartition(), 1800), (DirichletPartition(min_examples=3), 2700)], ids=str
)
def test_too_many_clients_is_an_error_with_both_numbers(partition: Partition, needed: int) -> None:
    with pytest.raises(ValueError) as caught:
        partition_indices(LABELS, partition, 900, seed=0)
    expected = f"num_clients: 900 clients need at least {needed} training examples, the data has 1797; "
    assert str(caught.value).startswith(expected)


@pytest.mark.filterwarnings("error")
def test_a_draw_that_can_not_be_had_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(ValueError) as caught:
        partition_indices(LABELS, DirichletPartition(alpha=0.05, min_examples=170), 10, seed=0)
    assert str(caught.value).startswith("task.partition: no Dirichlet draw gave each of 10 clients enough examples; ")
