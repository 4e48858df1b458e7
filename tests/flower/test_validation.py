"""What the server believes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_flwr.algorithms.base import Length
from fedkd_flwr.core.arrays import Array
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.roster import Seat
from fedkd_flwr.flower.validation import NormBound, implausible, most_examples, require_finite_scores


def update(norm: float) -> dict[str, Array]:
    """An update of this length, in two arrays."""
    return {"w": np.array([[0.6 * norm]], np.float32), "b": np.array(-0.8 * norm, np.float32)}


def primed(
    norms: Sequence[float], ratio: float | None = 5.0, excess: Literal["reject", "clip"] = "reject"
) -> NormBound:
    """A bound that has accepted these norms in its first round."""
    bound = NormBound(ratio, excess)
    bound.begin()
    for norm in norms:
        bound.admit(update(norm))
    bound.counted()
    return bound


def admitted(bound: NormBound, norm: float) -> bool:
    try:
        bound.admit(update(norm))
    except MessageError:
        return False
    return True


def test_the_norm_is_over_all_arrays_in_float64() -> None:
    assert Length().norm(update(5.0)) == pytest.approx(5.0)
    assert Length().norm({"w": np.full(4, 3e38, np.float32)}) == pytest.approx(6e38)
    assert Length().norm({}) == 0.0


def test_a_first_round_judges_itself() -> None:
    bound = NormBound(5.0, "reject")
    assert bound.needs_norms
    bound.begin([1.0, 1.2, 0.8, 1e6])
    assert [admitted(bound, norm) for norm in (1.0, 1.2, 0.8, 1e6)] == [True, True, True, False]


def test_norms_that_are_not_finite_prime_nothing() -> None:
    bound = NormBound(5.0, "reject")
    bound.begin([1.0, 1.0, 1.0, np.inf, np.nan, np.inf, np.inf])
    assert not admitted(bound, 6.0)


def test_six_accepted_norms_are_enough_to_judge_a_round_by() -> None:
    assert primed([1.0] * 5).needs_norms
    assert not primed([1.0] * 6).needs_norms
    assert not NormBound(None, "reject").needs_norms


def first_round(norms: Sequence[float], reference: float) -> list[bool]:
    """Which of a first round's updates are admitted."""
    bound = NormBound(5.0, "reject")
    bound.begin(norms, reference)
    return [admitted(bound, norm) for norm in norms]


@pytest.mark.parametrize(
    ("norms", "reference", "expected"),
    [
        ([1.0, 1e30], 3.0, [True, False]),
        ([24.9, 1.0], 0.0, [True, True]),  # far more steps than the other
        ([25.1, 1.0], 0.0, [False, True]),
        ([25.1, 1.0], 5.1, [True, True]),  # no longer than the model makes believable
        ([1e-30, 2.0], 1.0, [True, True]),  # next to nothing does not get the other rejected
        ([0.0, 1e30], 1.0, [True, False]),
        ([1e30], 1.0, [False]),  # nobody speaks for itself
        ([4.9], 1.0, [True]),
        ([0.0, 0.0, 1e30], 1.0, [True, True, False]),  # a median that says nothing
        ([1e30, np.inf], 1.0, [False, False]),
    ],
)
def test_where_too_few_lengths_are_known_the_shortest_and_the_model_bound_the_others(
    norms: list[float], reference: float, expected: list[bool]
) -> None:
    assert first_round(norms, reference) == expected


@given(st.floats(1e-6, 1e6), st.floats(1.0, 24.9), st.floats(0.0, 1e3))
def test_two_clients_of_very_different_sizes_are_both_believed(norm: float, factor: float, reference: float) -> None:
    assert first_round([norm, norm * factor], reference) == [True, True]


def test_a_rejection_says_what_the_bound_is_made_of() -> None:
    for norms, reference, words in (
        ([1.0, 1e30], 0.0, "more than 25 times the shortest of 2; at most 25 is believed"),
        ([1e30], 2.0, "more than 5 times the model's own; at most 10 is believed"),
    ):
        bound = NormBound(5.0, "reject")
        bound.begin(norms, reference)
        with pytest.raises(MessageError, match=words):
            bound.admit(update(1e30))


def test_without_a_model_and_without_others_there_is_no_bound() -> None:
    assert first_round([1e30], 0.0) == [True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    require_finite_scores({"accuracy": 0.5})
    require_finite_scores(None)
    with pytest.raises(ValueError, match="the next version's loss on the server's test set is"):
        require_finite_scores({"accuracy": 0.5, "loss": float(value)})


def test_the_bound_is_a_multiple_of_the_median_of_what_was_accepted() -> None:
    bound = primed([1.0, 2.0, 3.0, 100.0, 2.0, 2.0], ratio=4.0)
    bound.begin()
    assert admitted(bound, 7.99)
    assert not admitted(bound, 8.01)


def test_a_longer_update_is_rejected_with_its_kind_and_the_key_to_change() -> None:
    bound = primed([2.0] * 6)
    bound.begin()
    with pytest.raises(MessageError) as caught:
        bound.admit(update(100.0))
    assert caught.value.kind == "norm"
    assert str(caught.value) == (
        "its update's norm is 100, more than 5 times the usual; at most 10 is believed (server.validation."
        "max_norm_ratio)"
    )


def test_a_rejected_update_does_not_move_the_bound() -> None:
    bound = primed([1.0] * 6)
    for _ in range(50):
        bound.begin()
        assert [admitted(bound, norm) for norm in (1.0, 6.0, 1.0)] == [True, False, True]
        bound.counted()


def test_updates_of_a_round_that_did_not_count_are_forgotten() -> None:
    bound = primed([1.0] * 6)
    for _ in range(50):
        bound.begin()
        assert admitted(bound, 4.0)  # and the round is skipped
    bound.begin()
    assert not admitted(bound, 6.0)


def test_when_most_of_a_round_is_too_long_the_next_one_judges_itself() -> None:
    bound = primed([1.0] * 20)
    bound.begin()
    assert [admitted(bound, norm) for norm in (9.0, 9.5, 10.0, 1.0)] == [False, False, False, True]
    again = NormBound(5.0, "reject")
    again.restore(bound.saved())
    for one in (bound, again):
        assert one.needs_norms
        one.begin([9.0, 9.5, 10.0, 100.0])
        assert [admitted(one, norm) for norm in (9.0, 9.5, 10.0, 100.0)] == [True, True, True, False]


@given(st.floats(5.1, 1e6))
def test_a_clipped_update_keeps_its_direction_and_has_the_norm_of_the_bound(norm: float) -> None:
    bound = primed([1.0] * 6, excess="clip")
    bound.begin()
    longer = update(norm)
    clipped = bound.admit(longer)
    assert Length().norm(clipped) == pytest.approx(5.0, rel=1e-6)
    for name, value in longer.items():
        np.testing.assert_allclose(clipped[name], value * (5.0 / norm), rtol=1e-6)
        assert (clipped[name].dtype, clipped[name].shape) == (np.float32, value.shape)
    assert np.array_equal(longer["w"], update(norm)["w"])


def test_an_update_within_the_bound_is_not_touched() -> None:
    bound = primed([1.0] * 6, excess="clip")
    bound.begin()
    assert all(np.array_equal(bound.admit(update(4.9))[name], value) for name, value in update(4.9).items())


def test_clipping_lets_the_bound_follow_clients_whose_updates_grow() -> None:
    bound = primed([1.0] * 6, excess="clip")
    for _ in range(10):
        bound.begin()
        for _ in range(6):
            bound.admit(update(20.0))
        bound.counted()
    bound.begin()
    assert Length().norm(bound.admit(update(20.0))) == pytest.approx(20.0)


@settings(max_examples=50)
@given(st.permutations([0.5, 1.0, 1.5, 4.0, 30.0, 1e3]), st.sampled_from([0, 6]), st.sampled_from(["reject", "clip"]))
def test_the_verdict_does_not_depend_on_the_order_of_replies(
    norms: list[float], num_before: int, excess: Literal["reject", "clip"]
) -> None:
    def verdicts(order: Sequence[float]) -> list[float]:
        bound = primed([1.0] * num_before, excess=excess)
        bound.begin(order if bound.needs_norms else ())
        found = {}
        for norm in order:
            try:
                found[norm] = Length().norm(bound.admit(update(norm)))
            except MessageError:
                found[norm] = -1.0
        bound.begin()
        return [*(found[norm] for norm in sorted(found)), bound._limit or -1.0]

    assert verdicts(norms) == verdicts(sorted(norms))


def test_a_median_of_zero_gives_no_bound() -> None:
    bound = primed([0.0] * 6)
    bound.begin()
    assert admitted(bound, 1e6)


def test_without_a_ratio_everything_is_believed() -> None:
    bound = primed([1.0] * 10, ratio=None)
    bound.begin()
    assert admitted(bound, 1e30)


def test_a_restored_bound_judges_as_the_saved_one() -> None:
    bound, other = primed([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), primed([100.0] * 6)
    other.restore(bound.saved())
    for each in (bound, other):
        each.begin()
        assert admitted(each, 17.4)
        assert not admitted(each, 17.6)
    unknown = NormBound(5.0, "reject")
    unknown.restore(NormBound(5.0, "reject").saved())
    assert unknown.needs_norms


def test_old_norms_are_forgotten() -> None:
    bound = primed([1.0] * 128 + [100.0] * 65)  # one round: nothing is judged
    bound.begin()
    assert admitted(bound, 499.0)


# Claims


def seats(*num_examples: int, num_test: int = 10) -> list[Seat]:
    return [Seat(f"c{i}", i, 0, count, num_test) for i, count in enumerate(num_examples)]


def test_a_claim_far_above_the_median_is_not_believed() -> None:
    found = implausible(seats(10, 10, 20, 101), 10.0)
    assert set(found) == set()  # the median is 15
    found = implausible(seats(10, 10, 10, 10, 101), 10.0)
    assert found == {
        "c4": "claims 101 examples, more than 10 times the median of 10 (server.validation.max_examples_ratio)"
    }


def test_claims_of_test_examples_are_judged_alike() -> None:
    known = [*seats(10, 10, 10), Seat("liar", 9, 0, 10, 1000)]
    assert implausible(known, 10.0) == {
        "liar": "claims 1000 test examples, more than 10 times the median of 10 (server.validation.max_examples_ratio)"
    }


def test_a_claim_of_exactly_the_ratio_is_believed() -> None:
    assert implausible(seats(10, 10, 100), 10.0) == {}


@pytest.mark.parametrize(("known", "ratio"), [(seats(1, 10**9), 10.0), (seats(1, 1, 10**9), None), ([], 10.0)])
def test_of_two_clients_or_without_a_ratio_every_claim_is_believed(known: list[Seat], ratio: float | None) -> None:
    assert implausible(known, ratio) == {}


@pytest.mark.parametrize(
    ("known", "ratio", "expected"),
    [
        (seats(10, 20, 10**9), 3.0, 60.0),
        (seats(10, 10**9), 3.0, 30.0),  # of two, the smaller one decides
        (seats(10, 20, 10**9), None, float("inf")),
        ([], 3.0, float("inf")),
    ],
)
def test_a_client_counts_for_a_few_times_the_usual_number_of_examples(
    known: list[Seat], ratio: float | None, expected: float
) -> None:
    assert most_examples(known, ratio) == expected


def test_clients_that_have_replied_say_how_many_examples_are_usual() -> None:
    proven = [replace(seat, replied_round=1) for seat in seats(10, 12, 14)]
    assert most_examples([*proven, *seats(*[10**6] * 9)], 3.0) == 36.0
