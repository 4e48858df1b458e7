from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.core.arrays import (
    Array,
    RunningMean,
    TensorSpec,
    apply_update,
    difference,
    digest,
    num_elements,
    require_finite,
    spec_digest,
    weighted_mean,
)

SPEC = (TensorSpec("w", (2, 3)), TensorSpec("b", (3,)), TensorSpec("bn.running_var", (3,), "buffer"))


def item(seed: int, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {t.name: (scale * rng.standard_normal(t.shape)).astype(np.float32) for t in SPEC}


# Spec


@pytest.mark.parametrize(("shape", "size"), [((), 1), ((3,), 3), ((2, 3, 4), 24), ((0, 3), 0)])
def test_size_is_the_number_of_elements(shape: tuple[int, ...], size: int) -> None:
    assert TensorSpec("w", shape).size == size


def test_size_does_not_overflow_32_bits() -> None:
    assert TensorSpec("w", (2**20, 2**20)).size == 2**40


def test_num_elements_adds_all_tensors() -> None:
    assert num_elements(SPEC) == 12
    assert num_elements(()) == 0


@pytest.mark.parametrize(
    "other",
    [
        (TensorSpec("v", (2, 3)), *SPEC[1:]),
        (TensorSpec("w", (3, 2)), *SPEC[1:]),
        (TensorSpec("w", (6,)), *SPEC[1:]),
        (TensorSpec("w", (2, 3), "buffer"), *SPEC[1:]),
        (SPEC[1], SPEC[0], SPEC[2]),
        SPEC[:2],
        (),
    ],
    ids=["name", "shape", "rank", "kind", "order", "fewer", "none"],
)
def test_spec_digest_changes_with_every_part(other: tuple[TensorSpec, ...]) -> None:
    assert spec_digest(other) != spec_digest(SPEC)


def test_spec_digest_is_eight_bytes_that_repeat() -> None:
    assert spec_digest(SPEC) == spec_digest(tuple(SPEC))
    assert len(spec_digest(SPEC)) == len(spec_digest(())) == 8


# Digest of values


def test_digest_does_not_depend_on_the_order_of_insertion_or_the_layout() -> None:
    arrays = item(0)
    turned = {name: np.asfortranarray(arrays[name]) for name in reversed(arrays)}
    assert digest(turned) == digest(arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {**a, "w": a["w"] + np.float32(1e-6)},
        lambda a: {**a, "w": a["w"].astype(np.float64)},
        lambda a: {**a, "w": a["w"].reshape(3, 2)},
        lambda a: {"v": a["w"], "b": a["b"], "bn.running_var": a["bn.running_var"]},
        lambda a: {**a, "w": a["b"], "b": a["w"]},
        lambda a: {"w": a["w"], "b": a["b"]},
    ],
    ids=["value", "dtype", "shape", "name", "swapped", "fewer"],
)
def test_digest_changes_with_every_part(change: Callable[[dict[str, Array]], dict[str, Array]]) -> None:
    assert digest(change(item(0))) != digest(item(0))


def test_digest_tells_types_of_the_same_bytes_apart() -> None:
    assert digest({"w": np.zeros(3, np.float32)}) != digest({"w": np.zeros(3, np.int32)})


# Updates


def test_difference_is_local_minus_reference_for_the_tensors_of_the_spec_only() -> None:
    local = {"w": np.full((2, 3), 3.0, np.float32), "b": np.ones(3, np.float32), "steps": np.array([7])}
    reference = {"w": np.ones((2, 3), np.float32), "b": np.full(3, 2.0, np.float32), "steps": np.array([1])}
    update = difference(local, reference, SPEC[:2])
    assert list(update) == ["w", "b"]
    assert np.array_equal(update["w"], np.full((2, 3), 2.0))
    assert np.array_equal(update["b"], np.full(3, -1.0))
    assert {value.dtype for value in update.values()} == {np.dtype(np.float32)}


def test_applying_the_difference_arrives_at_the_local_arrays() -> None:
    local, reference = item(0), item(1)
    local["bn.running_var"] = np.abs(local["bn.running_var"])
    moved = apply_update(reference, difference(local, reference, SPEC))
    for name, value in local.items():
        np.testing.assert_allclose(moved[name], value, rtol=0, atol=1e-6)
        assert moved[name].dtype == np.float32


@pytest.mark.parametrize("name", ["running_var", "layer.1.bn.running_var"])
def test_applying_an_update_clamps_a_batchnorm_variance_at_zero(name: str) -> None:
    moved = apply_update({name: np.array([1.0, 1.0], np.float32)}, {name: np.array([-1.5, 0.5], np.float32)})
    assert moved[name].tolist() == [0.0, 1.5]
    assert moved[name].dtype == np.float32


@pytest.mark.parametrize("name", ["bn.running_mean", "bn.weight", "running_var.weight"])
def test_applying_an_update_lets_other_tensors_be_negative(name: str) -> None:
    moved = apply_update({name: np.array([1.0], np.float32)}, {name: np.array([-1.5], np.float32)})
    assert moved[name].tolist() == [-0.5]


def test_tensors_without_an_update_are_carried_over() -> None:
    reference = {**item(0), "bn.num_batches_tracked": np.array(3, np.int64)}
    moved = apply_update(reference, {"b": np.ones(3, np.float32)})
    assert moved.keys() == reference.keys()
    assert np.array_equal(moved["w"], reference["w"])
    assert moved["bn.num_batches_tracked"] == 3
    assert moved["bn.num_batches_tracked"].dtype == np.int64


def test_arithmetic_of_updates_leaves_its_arguments_as_they_were() -> None:
    local, reference = item(0), item(1)
    reference["bn.running_var"] = np.full(3, -1.0, np.float32)
    before = deepcopy((local, reference))
    update = difference(local, reference, SPEC)
    kept = deepcopy(update)
    moved = apply_update(reference, update)
    for name in update:
        update[name] += 1
        moved[name] += 1
    for now, then in zip((local, reference), before, strict=True):
        assert now.keys() == then.keys()
        assert all(np.array_equal(now[name], then[name]) for name in now)
    assert all(np.array_equal(update[name], kept[name] + 1) for name in update)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    update = item(0)
    update["b"][1] = bad
    with pytest.raises(ValueError, match="update of 'b' is not finite"):
        require_finite(update)


def test_a_finite_update_is_let_through() -> None:
    require_finite(item(0))
    require_finite({"empty": np.zeros((0, 3), np.float32), "large": np.array([3e38], np.float32)})


# Means


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_mean_is_the_weighted_average_in_float32(weights: list[float], seed: int, scale: float) -> None:
    items = [item(seed + i, scale) for i in range(len(weights))]
    mean = weighted_mean(zip(items, weights, strict=True))
    assert mean.keys() == items[0].keys()
    for name, value in mean.items():
        stacked = np.stack([x[name].astype(np.float64) for x in items])
        np.testing.assert_allclose(value, np.average(stacked, axis=0, weights=weights), rtol=1e-6, atol=1e-7 * scale)
        assert value.dtype == np.float32


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=6), seed=st.integers(0, 2**32), data=st.data())
def test_mean_does_not_depend_on_the_order(weights: list[int], seed: int, data: st.DataObject) -> None:
    items = [(item(seed + i), float(weight)) for i, weight in enumerate(weights)]
    shuffled = data.draw(st.permutations(items))
    one, two = weighted_mean(items), weighted_mean(shuffled)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, atol=1e-7)


def test_mean_of_one_item_is_that_item_bit_for_bit() -> None:
    only = item(0)
    mean = weighted_mean([(only, 0.3)])
    for name, value in only.items():
        np.testing.assert_array_max_ulp(mean[name], value, maxulp=0)


def test_weights_count_relative_to_their_sum() -> None:
    zeros, ones = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    assert weighted_mean([(zeros, 3), (ones, 1)])["w"].tolist() == [0.25, 0.25]


def test_mean_accumulates_in_float64() -> None:
    # 2**24 + 1 is 2**24 in float32, so a float32 sum would lose the small items.
    items = [({"w": np.array([value], np.float32)}, 1.0) for value in (2.0**24, 1.0, 1.0, -(2.0**24))]
    assert weighted_mean(items)["w"].tolist() == [0.5]


def test_mean_does_not_look_at_an_item_again_after_adding_it() -> None:
    mean, value = RunningMean(), np.ones(3, np.float32)
    mean.add({"w": value}, 1.0)
    value += 10
    assert mean.result()["w"].tolist() == [1.0, 1.0, 1.0]


def test_adding_to_a_mean_leaves_the_item_as_it_was() -> None:
    mean, first = RunningMean(), {"w": np.ones(3, np.float64)}
    mean.add(first, 1.0)
    mean.add({"w": np.ones(3, np.float64)}, 2.0)
    assert first["w"].tolist() == [1.0, 1.0, 1.0]


def test_mean_so_far_can_be_read_between_items() -> None:
    mean = RunningMean()
    mean.add({"w": np.array([1.0], np.float32)}, 1.0)
    early = mean.result()
    mean.add({"w": np.array([4.0], np.float32)}, 2.0)
    assert (early["w"].tolist(), mean.result()["w"].tolist()) == ([1.0], [3.0])


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mean of no items"):
        RunningMean().result()
    with pytest.raises(ValueError, match="mean of no items"):
        weighted_mean([])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_positive_and_finite_is_refused_and_leaves_the_mean(weight: float) -> None:
    mean = RunningMean()
    mean.add({"w": np.ones(1, np.float32)}, 1.0)
    with pytest.raises(ValueError, match="weight must be a positive finite number"):
        mean.add({"w": np.full(1, 9.0, np.float32)}, weight)
    assert mean.result()["w"].tolist() == [1.0]


@pytest.mark.parametrize("names", [["w"], ["w", "b", "extra"], ["w", "other"]])
def test_items_with_other_names_are_refused_and_leave_the_mean(names: list[str]) -> None:
    mean = RunningMean()
    mean.add({"w": np.ones(1, np.float32), "b": np.ones(1, np.float32)}, 1.0)
    with pytest.raises(ValueError, match="all items need the same arrays; differing"):
        mean.add({name: np.full(1, 9.0, np.float32) for name in names}, 1.0)
    assert mean.result()["w"].tolist() == [1.0]


def test_scalars_stay_arrays_and_keep_their_shape() -> None:
    spec = (TensorSpec("scale", ()),)
    update = difference({"scale": np.array(3, np.float32)}, {"scale": np.array(1, np.float32)}, spec)
    moved = apply_update({"scale": np.array(1, np.float32)}, update)
    mean = weighted_mean([(update, 1.0), (update, 3.0)])
    for arrays in (update, moved, mean):
        assert isinstance(arrays["scale"], np.ndarray)
        assert (arrays["scale"].shape, arrays["scale"].dtype) == ((), np.float32)


def test_digest_tells_a_scalar_from_a_vector_of_one() -> None:
    assert digest({"x": np.zeros(())}) != digest({"x": np.zeros(1)})


def test_the_running_mean_refuses_another_shape_and_a_first_item_without_arrays_counts() -> None:
    mean = RunningMean()
    mean.add({"x": np.zeros(3, np.float32)}, 1.0)
    with pytest.raises(ValueError, match="same shapes"):
        mean.add({"x": np.zeros(1, np.float32)}, 1.0)
    empty = RunningMean()
    empty.add({}, 1.0)
    with pytest.raises(ValueError, match="same arrays"):
        empty.add({"x": np.zeros(3, np.float32)}, 1.0)
