import numpy as np
import pytest
import torch

from fedkd_flwr.tasks.text import TokenExamples


def lengths_only(lengths: list[int]) -> TokenExamples:
    """Row n is the number n, as often as its length says."""
    rows = [np.full(length, place) for place, length in enumerate(lengths)]
    return TokenExamples({"input_ids": rows}, {"input_ids": -1}, torch.arange(len(lengths)))


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 4), (4, 4), (150, 4), (150, 1000)])
def test_every_row_comes_once_whatever_the_order(num_rows: int, size: int, seed: int | None) -> None:
    lengths = np.random.default_rng(1).integers(1, 20, num_rows).tolist()
    batches = list(lengths_only(lengths).batches(size, seed))
    assert sorted(int(label) for batch in batches for label in batch["labels"]) == list(range(num_rows))
    assert len(batches) == -(-num_rows // size)
    for batch in batches:
        for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert [value for value in ids if value >= 0] == [label] * lengths[label]


def test_rows_come_in_order_without_a_seed() -> None:
    examples = lengths_only([3, 1, 2, 5])
    assert [batch["labels"].tolist() for batch in examples.batches(3)] == [[0, 1, 2], [3]]


def test_a_seed_decides_the_order() -> None:
    examples = lengths_only(np.random.default_rng(1).integers(1, 20, 100).tolist())
    first, again, other = (
        [batch["labels"].tolist() for batch in examples.batches(8, seed)] for seed in (2**64 + 3, 2**64 + 3, 4)
    )
    assert first == again != other
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}  # not the same batches either


def test_shuffled_batches_hold_rows_of_like_length() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 512)
    examples = lengths_only(lengths.tolist())
    padded = sum(batch["input_ids"].numel() for batch in examples.batches(8, 0))
    at_random = sum(8 * rows.max() for rows in np.random.default_rng(0).permutation(lengths).reshape(-1, 8))
    assert lengths.sum() < padded < lengths.sum() + 0.2 * (at_random - lengths.sum())
    widths = [batch["input_ids"].shape[1] for batch in examples.batches(8, 0)]
    assert widths != sorted(widths)
