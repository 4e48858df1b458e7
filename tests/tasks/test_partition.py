import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedkd_flwr.tasks.partition import (
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    Partition,
    hold_out,
    natural_indices,
    partition_indices,
    require_client,
)

LABELS: list[int] = load_digits().target.tolist()
EVERY_KIND = pytest.mark.parametrize(
    "partition", [IidPartition(), DirichletPartition(alpha=0.3), DirichletPartition(alpha=100.0)], ids=str
)

BY_SITE = NaturalPartition(column="site")


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


@pytest.mark.parametrize(
    "sites", [["b", "a", "b", "c", "a"], [10, 9, 10, 30, 9], [True, False, True]], ids=["text", "numbers", "booleans"]
)
def test_each_distinct_value_is_a_client_in_sorted_order(sites: list[str | int]) -> None:
    distinct = sorted(set(sites))
    rows, of_test = natural_indices(sites, [], BY_SITE, len(distinct))
    assert [{sites[row] for row in mine} for mine in rows] == [{value} for value in distinct]
    assert sorted(row for mine in rows for row in mine) == list(range(len(sites)))
    assert of_test == [[]] * len(distinct)


def test_numbers_are_sorted_as_numbers() -> None:
    assert natural_indices([10, 9, 100], [], BY_SITE, 3)[0] == [[1], [0], [2]]


def test_rows_of_the_test_split_go_to_the_client_of_their_value_or_to_nobody() -> None:
    _, of_test = natural_indices(["a", "b", "c"], ["c", "z", "a", "c", None], BY_SITE, 3)
    assert of_test == [[2], [], [0, 3]]


@pytest.mark.parametrize("num_clients", [1, 3])
def test_another_number_of_clients_than_the_column_has_is_an_error_with_both(num_clients: int) -> None:
    with pytest.raises(ValueError) as caught:
        natural_indices(["a", "b"], [], BY_SITE, num_clients)
    assert str(caught.value) == (
        f"num_clients: must be 2, the number of distinct values of column 'site', got {num_clients}"
    )


@pytest.mark.parametrize("sites", [["a", None], [["a"], ["b"]], [{"a": 1}, {"a": 2}]], ids=str)
def test_a_column_that_can_not_tell_clients_apart_is_an_error(sites: list[object]) -> None:
    with pytest.raises(ValueError, match=r"^task\.partition\.column: 'site' must hold a number or a text in every row"):
        natural_indices(sites, [], BY_SITE, 2)


@pytest.mark.parametrize(
    ("num_rows", "fraction", "num_test"),
    [(10, 0.2, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0)],
)
def test_a_held_out_share_leaves_neither_side_empty_where_it_can(num_rows: int, fraction: float, num_test: int) -> None:
    rows = np.arange(100, 100 + num_rows)
    train, test = hold_out(rows, fraction, seed=1)
    assert len(test) == num_test
    assert sorted([*train, *test]) == rows.tolist()


def test_the_seed_alone_decides_what_is_held_out() -> None:
    rows = np.arange(100)
    first, again, other = (hold_out(rows, 0.3, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("partition_id", [-1, 3])
def test_a_client_that_does_not_exist_is_an_error_with_the_range(partition_id: int) -> None:
    require_client(2, 3)
    with pytest.raises(ValueError) as caught:
        require_client(partition_id, 3)
    assert str(caught.value) == f"partition-id must be in [0, 2], got {partition_id}"
