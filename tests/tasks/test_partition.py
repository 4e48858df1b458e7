import math
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedkd_flwr.tasks.partition import (
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    Partition,
    PathologicalPartition,
    SizePartition,
    client_notes,
    hold_out,
    hold_out_groups,
    label_counts,
    natural_indices,
    partition_indices,
    require_client,
)
from fedkd_flwr.tasks.rare_labels import RareLabelsPartition

LABELS: list[int] = load_digits().target.tolist()
EVERY_KIND = pytest.mark.parametrize(
    "partition",
    [
        IidPartition(),
        DirichletPartition(alpha=0.3),
        DirichletPartition(alpha=100.0),
        PathologicalPartition(classes_per_client=10),
        SizePartition(),
        SizePartition(growth="square"),
    ],
    ids=str,
)

BY_SITE = NaturalPartition(column="site")
BY_GROUP = NaturalPartition(column="site", grouped=True)


def skew(labels: list[int], partition: Partition, seed: int) -> float:
    """Mean total variation between a client's label mix and everyone's, in [0, 1]."""
    everyone = np.bincount(labels) / len(labels)
    mixes = [
        np.bincount(np.array(labels)[rows], minlength=10) for rows in partition_indices(labels, partition, 5, seed)
    ]
    return float(np.mean([np.abs(mix / mix.sum() - everyone).sum() / 2 for mix in mixes]))


def test_rare_labels_are_cut_to_what_is_kept_and_no_other_is() -> None:
    labels = np.arange(4000) % 10
    partition = RareLabelsPartition(num_rare=3, num_kept=5, examples_per_client=800)
    clients = partition_indices(labels.tolist(), partition, 5, seed=0)
    assert len({row for rows in clients for row in rows}) == sum(map(len, clients))
    which = []
    for rows in clients:
        counts = np.bincount(labels[rows], minlength=10)
        assert sorted(counts)[:3] == [5, 5, 5] and sorted(counts)[3] > 50
        assert len(rows) < 800 - 3 * 50
        which.append(tuple(np.flatnonzero(counts == 5)))
    assert len(set(which)) > 1  # drawn for each client
    assert clients == partition_indices(labels.tolist(), partition, 5, seed=0)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (RareLabelsPartition(num_rare=10), "num_rare: must be below 10, the labels of the training data, got 10"),
        (RareLabelsPartition(examples_per_client=500), "5 clients can have 359 examples each, got 500"),
    ],
)
def test_rare_labels_that_can_not_be_had_are_refused(partition: RareLabelsPartition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_indices(LABELS, partition, 5, seed=0)


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


# A few classes each


@given(
    num_clients=st.integers(1, 12),
    classes_per_client=st.integers(1, 6),
    sizes=st.lists(st.integers(13, 20), min_size=2, max_size=8),
    seed=st.integers(0, 2**63),
)
@settings(deadline=None, max_examples=40)
def test_pathological_clients_have_so_many_classes_and_together_all_rows_or_are_refused(
    num_clients: int, classes_per_client: int, sizes: list[int], seed: int
) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    partition = PathologicalPartition(classes_per_client=classes_per_client)
    fits = classes_per_client <= len(sizes) <= num_clients * classes_per_client
    try:
        clients = partition_indices(labels, partition, num_clients, seed)
    except ValueError as error:
        told = str(error)
        assert told.startswith("task.partition.classes_per_client: ")
        # One class each, cut into as many parts as it has examples, leaves clients with one.
        assert not fits or ("cut the" in told and classes_per_client == 1)
        return
    assert fits
    assert sorted(row for rows in clients for row in rows) == list(range(len(labels)))
    assert all(len({labels[row] for row in rows}) == classes_per_client for rows in clients)
    assert min(map(len, clients)) >= 2


@pytest.mark.parametrize("num_clients", [4, 5, 20])
def test_the_seed_decides_which_classes_and_which_rows(num_clients: int) -> None:
    partition = PathologicalPartition(classes_per_client=3)
    first, again, other = (partition_indices(LABELS, partition, num_clients, seed) for seed in (3, 3, 4))
    assert first == again
    assert [{LABELS[row] for row in rows} for rows in first] != [{LABELS[row] for row in rows} for rows in other]


@pytest.mark.parametrize("num_clients", [5, 10, 20])
def test_every_class_has_as_many_pathological_clients_as_any_other(num_clients: int) -> None:
    clients = partition_indices(LABELS, PathologicalPartition(), num_clients, seed=1)
    shares = Counter(label for rows in clients for label in {LABELS[row] for row in rows})
    assert set(shares.values()) == {num_clients // 5}


@pytest.mark.parametrize(
    ("num_clients", "classes_per_client", "says"),
    [
        (3, 11, "must be at most 10, the classes of the training data, got 11"),
        (
            4,
            2,
            "4 clients of 2 would leave 2 of 10 classes to nobody, and their examples unused; "
            "raise it to 3 or num_clients to 5 at least",
        ),
        (
            300,
            10,
            "300 clients of 10 cut the 10 classes into more parts than they have examples for, the smallest has 174; "
            "lower num_clients or classes_per_client",
        ),
        (890, 1, "890 clients of 1 cut the 10 classes into more parts than they have examples for, the smallest has "),
    ],
)
def test_classes_that_can_not_be_dealt_so_are_an_error(num_clients: int, classes_per_client: int, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        partition_indices(LABELS, PathologicalPartition(classes_per_client=classes_per_client), num_clients, seed=0)
    assert str(caught.value).startswith(f"task.partition.classes_per_client: {says}")


# Sizes


@pytest.mark.parametrize(
    ("growth", "shares"), [("linear", [1, 2, 3, 4]), ("square", [1, 4, 9, 16]), ("exponential", [1, 2.72, 7.39, 20.1])]
)
def test_sizes_grow_as_they_are_told_to(growth: str, shares: list[float]) -> None:
    partition = SizePartition.model_validate({"growth": growth})
    sizes = [len(rows) for rows in partition_indices(LABELS, partition, 4, seed=0)]
    assert sizes == pytest.approx([len(LABELS) * share / sum(shares) for share in shares], abs=4)


def test_sizes_differ_and_labels_do_not() -> None:
    assert skew(LABELS, SizePartition(growth="square"), seed=0) < 0.12


@pytest.mark.parametrize(
    ("growth", "num_clients", "remedy"),
    [
        ("linear", 100, "lower num_clients"),
        ("square", 30, "lower num_clients, or let them grow more slowly"),
        ("exponential", 8, "lower num_clients, or let them grow more slowly"),
        ("exponential", 800, "lower num_clients, or let them grow more slowly"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_share_that_is_too_small_is_an_error(growth: str, num_clients: int, remedy: str) -> None:
    with pytest.raises(ValueError) as caught:
        partition_indices(LABELS, SizePartition.model_validate({"growth": growth}), num_clients, seed=0)
    assert str(caught.value) == (
        f"task.partition.growth: {growth} shares of 1797 training examples leave some of {num_clients} clients "
        f"fewer than 2; {remedy}"
    )


# A column


@pytest.mark.parametrize(
    "sites", [["b", "a", "b", "c", "a"], [10, 9, 10, 30, 9], [True, False, True]], ids=["text", "numbers", "booleans"]
)
def test_each_distinct_value_is_a_client_in_sorted_order(sites: list[str | int]) -> None:
    distinct = sorted(set(sites))
    rows, of_test = natural_indices(sites, [], BY_SITE, len(distinct), seed=0)
    assert [{sites[row] for row in mine} for mine in rows] == [{value} for value in distinct]
    assert sorted(row for mine in rows for row in mine) == list(range(len(sites)))
    assert of_test == [[]] * len(distinct)


def test_numbers_are_sorted_as_numbers() -> None:
    assert natural_indices([10, 9, 100], [], BY_SITE, 3, seed=0)[0] == [[1], [0], [2]]


def test_rows_of_the_test_split_go_to_the_client_of_their_value_or_to_nobody() -> None:
    _, of_test = natural_indices(["a", "b", "c"], ["c", "z", "a", "c", None], BY_SITE, 3, seed=0)
    assert of_test == [[2], [], [0, 3]]


@pytest.mark.parametrize("num_clients", [1, 3])
def test_another_number_of_clients_than_the_column_has_is_an_error_with_both(num_clients: int) -> None:
    with pytest.raises(ValueError) as caught:
        natural_indices(["a", "b"], [], BY_SITE, num_clients, seed=0)
    assert str(caught.value) == (
        f"num_clients: must be 2, the number of distinct values of column 'site', got {num_clients}"
    )


@pytest.mark.parametrize("sites", [[1, "a"], [["a"], ["b"]], [{"a": 1}, {"a": 2}]], ids=str)
def test_a_column_that_can_not_tell_clients_apart_is_an_error(sites: list[object]) -> None:
    with pytest.raises(
        ValueError, match=r"^task\.partition\.column: 'site' must hold a number in every row, or a text"
    ):
        natural_indices(sites, [], BY_SITE, 2, seed=0)


@pytest.mark.parametrize(
    "nothing", [None, math.nan, math.inf, -math.inf, "", " \t", "\u00a0", Decimal("NaN")], ids=repr
)
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_without_an_origin_are_refused_with_their_number(nothing: object, grouped: bool) -> None:
    other = "a" if nothing is None or isinstance(nothing, str) else 1.0
    partition = NaturalPartition(column="site", grouped=grouped)
    with pytest.raises(ValueError) as caught:
        natural_indices([other, nothing, other, nothing], [], partition, 2, seed=0)
    assert str(caught.value) == (
        "task.partition.column: 'site' names no origin in 2 of 4 rows (the first is row 1); it must hold a number or a "
        "text in every row: fill it, or remove these rows"
    )


def test_a_whole_number_and_the_same_with_a_point_are_one_origin() -> None:
    assert natural_indices([1, 2.0, 1.0, 2], [2.0], BY_SITE, 2, seed=0) == ([[0, 2], [1, 3]], [[], [0]])


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    num_clients=st.integers(1, 12),
    seed=st.integers(0, 2**63),
)
@settings(deadline=None)
def test_grouped_values_stay_whole_and_every_client_has_some(sizes: list[int], num_clients: int, seed: int) -> None:
    sites = [f"document {site}" for site, size in enumerate(sizes) for _ in range(size)]
    if num_clients > len(sizes):
        with pytest.raises(ValueError) as caught:
            natural_indices(sites, [], BY_GROUP, num_clients, seed)
        assert str(caught.value) == (
            f"num_clients: must be at most {len(sizes)}, the number of distinct values of column 'site', "
            f"got {num_clients}"
        )
        return
    clients, _ = natural_indices(sites, [], BY_GROUP, num_clients, seed)
    assert clients == natural_indices(sites, [], BY_GROUP, num_clients, seed)[0]
    assert sorted(row for rows in clients for row in rows) == list(range(len(sites)))
    having = [{sites[row] for row in rows} for rows in clients]
    assert all(having)
    assert sum(map(len, having)) == len(sizes)
    # The fullest got its last group when it had the fewest rows of all.
    loads = [len(rows) for rows in clients]
    assert max(loads) - min(loads) <= max(sizes)


def test_many_grouped_values_give_clients_nearly_as_many_rows_each() -> None:
    sizes = np.random.default_rng(0).integers(1, 60, 300)
    sites = np.repeat(np.arange(300), sizes).tolist()
    for seed in range(5):
        loads = [len(rows) for rows in natural_indices(sites, [], BY_GROUP, 20, seed)[0]]
        assert max(loads) - min(loads) <= 5, loads


@pytest.mark.parametrize("num_clients", [5, 40])
def test_another_seed_groups_other_values(num_clients: int) -> None:
    sites = [site for site in range(40) for _ in range(site + 1)]  # no two of one size
    first, other = (natural_indices(sites, [], BY_GROUP, num_clients, seed)[0] for seed in (3, 4))
    assert first != other
    assert sorted(first) != sorted(other) or num_clients == 40


def test_rows_of_the_test_split_follow_their_group_or_are_nobodys() -> None:
    train = ["a", "b", "c", "d"]
    rows, of_test = natural_indices(train, ["z", *train, "y"], BY_GROUP, 2, seed=0)
    assert [[row + 1 for row in mine] for mine in rows] == of_test
    assert natural_indices(train, ["z", "y"], BY_GROUP, 2, seed=0)[1] == [[], []]


# What a client keeps for its score


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


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=15),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63),
)
@settings(deadline=None)
def test_held_out_groups_are_whole_and_neither_side_is_empty_where_there_are_two(
    sizes: list[int], fraction: float, seed: int
) -> None:
    groups = [f"document {group}" for group, size in enumerate(sizes) for _ in range(size)]
    rows = np.arange(100, 100 + len(groups))
    train, test = hold_out_groups(rows, groups, fraction, seed)
    assert sorted([*train, *test]) == rows.tolist()
    assert not {groups[row - 100] for row in train} & {groups[row - 100] for row in test}
    assert len(train) > 0
    assert (len(test) > 0) == (len(sizes) > 1)
    # Of ones there are always some that fit.
    assert len(test) <= max(1, round(fraction * len(rows))) or len(test) == min(sizes)


def test_the_seed_alone_decides_which_groups_are_held_out() -> None:
    rows, groups = np.arange(100), np.repeat(np.arange(20), 5).tolist()
    first, again, other = (hold_out_groups(rows, groups, 0.3, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 30


# What is told of the clients


def test_labels_are_counted_for_each_client_and_class() -> None:
    assert label_counts([2, 0, 2, 1, 0], [[0, 2], [1, 3, 4], []], 4) == ((0, 0, 2, 0), (2, 1, 0, 0), (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        (((3, 0), (1, 2)), "client 0 has training examples of one class only (1 of 2 clients)"),
        (((3, 0), (0, 2), (1, 1)), "clients 0, 1 have training examples of one class only (2 of 3 clients)"),
        (
            ((1, 1), *((0, 5),) * 7),
            "clients 1, 2, 3, 4, 5 and 2 more have training examples of one class only (7 of 8 clients)",
        ),
    ],
)
def test_clients_of_one_class_are_noted_the_first_by_number(counts: tuple[tuple[int, ...], ...], note: str) -> None:
    assert client_notes(counts) == (note,)


def test_nothing_is_noted_of_clients_with_several_classes() -> None:
    assert client_notes(((1, 1, 0), (0, 1, 1))) == ()


@pytest.mark.parametrize("partition_id", [-1, 3])
def test_a_client_that_does_not_exist_is_an_error_with_the_range(partition_id: int) -> None:
    require_client(2, 3)
    with pytest.raises(ValueError) as caught:
        require_client(partition_id, 3)
    assert str(caught.value) == f"partition-id must be in [0, 2], got {partition_id}"
