"""Who may be sent again what it was sent before."""

from collections import Counter
from itertools import pairwise

import pytest

from fedkd_flwr.flower.resyncs import Resyncs
from fedkd_flwr.flower.roster import Seat


def lost(*keys: str) -> list[Seat]:
    """Clients that hold less than they were sent."""
    return [Seat(key, i, None, 10, sent_version=3) for i, key in enumerate(keys)]


def keys_of(seats: list[Seat]) -> list[str]:
    return [seat.client_key for seat in seats]


def rounds_served(resyncs: Resyncs, first: int, last: int) -> list[int]:
    """Rounds in which a client that forgets everything at once is served."""
    served = []
    for server_round in range(first, last + 1):
        if resyncs.eligible(lost("a"), server_round):
            resyncs.served("a", server_round)
            served.append(server_round)
    return served


def test_a_client_that_keeps_forgetting_waits_twice_as_long_each_time_and_at_most_32_rounds() -> None:
    served = rounds_served(Resyncs(per_round=1, seed=0), 1, 200)
    waits = [later - earlier for earlier, later in pairwise(served)]
    assert served[0] == 1
    assert waits[:8] == [1, 2, 4, 8, 16, 32, 32, 32]


def test_each_good_reply_of_a_client_that_forgot_nothing_forgives_one_time() -> None:
    resyncs = Resyncs(per_round=1, seed=0)
    assert rounds_served(resyncs, 1, 8) == [1, 2, 4, 8]
    resyncs.kept("a")
    resyncs.kept("a")
    assert rounds_served(resyncs, 9, 20) == [10, 14]


def test_a_client_with_more_good_replies_than_lapses_begins_anew() -> None:
    resyncs = Resyncs(per_round=1, seed=0)
    rounds_served(resyncs, 1, 2)
    for _ in range(3):
        resyncs.kept("a")
    assert rounds_served(resyncs, 3, 8) == [3, 4, 6]


def test_time_alone_forgives_nothing() -> None:
    resyncs = Resyncs(per_round=1, seed=0)
    assert rounds_served(resyncs, 1, 8)[-1] == 8
    assert rounds_served(resyncs, 100, 140) == [100, 116]


def test_a_client_that_holds_what_it_was_sent_is_always_eligible() -> None:
    resyncs = Resyncs(per_round=0, seed=0)
    well = [
        Seat("current", 1, 3, 10, sent_version=3),
        Seat("new", 2, None, 10),
        Seat("from version 0", 3, 0, 10, sent_version=-1),
        Seat("at version 0", 4, 0, 10, sent_version=0),
    ]
    assert resyncs.eligible(well, 1) == well
    assert resyncs.eligible([*well, *lost("a")], 1) == well


@pytest.mark.parametrize(("per_round", "expected"), [(0, 0), (1, 1), (3, 3), (9, 5)])
def test_only_so_many_are_served_in_one_round(per_round: int, expected: int) -> None:
    assert len(Resyncs(per_round, seed=0).eligible(lost(*"abcde"), 1)) == expected


def test_who_is_served_follows_seed_and_round_and_not_the_order_of_seats() -> None:
    seats = lost(*"abcdef")
    for server_round in range(1, 6):
        chosen = set(keys_of(Resyncs(2, seed=7).eligible(seats, server_round)))
        assert chosen == set(keys_of(Resyncs(2, seed=7).eligible(seats[::-1], server_round)))
    by_round = {tuple(keys_of(Resyncs(2, seed=7).eligible(seats, number))) for number in range(1, 20)}
    by_seed = {tuple(keys_of(Resyncs(2, seed=seed).eligible(seats, 1))) for seed in range(20)}
    assert len(by_round) > 3
    assert len(by_seed) > 3


def test_seats_keep_their_order() -> None:
    seats = [*lost("b"), Seat("c", 5, 3, 10), *lost("a")]
    assert keys_of(Resyncs(2, seed=0).eligible(seats, 1)) == ["b", "c", "a"]


def test_being_eligible_costs_nothing_until_served() -> None:
    resyncs = Resyncs(per_round=1, seed=0)
    for _ in range(5):
        assert resyncs.eligible(lost("a"), 1)


def test_a_client_that_waits_takes_no_place_from_another() -> None:
    resyncs = Resyncs(per_round=1, seed=0)
    for server_round in (1, 2, 4):
        resyncs.served("a", server_round)
    assert keys_of(resyncs.eligible(lost("a", "b"), 5)) == ["b"]


def test_everybody_is_served_in_the_end() -> None:
    resyncs, times = Resyncs(per_round=1, seed=3), Counter[str]()
    for server_round in range(1, 40):
        for seat in resyncs.eligible(lost(*"abcd"), server_round):
            resyncs.served(seat.client_key, server_round)
            times[seat.client_key] += 1
    assert min(times[key] for key in "abcd") >= 3


def test_a_restored_back_off_goes_on() -> None:
    saved, fresh = Resyncs(per_round=1, seed=0), Resyncs(per_round=1, seed=0)
    rounds_served(saved, 1, 8)
    fresh.restore(saved.saved())
    assert rounds_served(fresh, 9, 40) == rounds_served(saved, 9, 40) == [16, 32]


def test_a_client_that_is_not_served_the_moment_it_may_be_is_not_taken_for_well() -> None:
    resyncs, served = Resyncs(per_round=1, seed=0), []
    for server_round in range(3, 400, 3):  # it needs a resync all along and is sampled every third round
        if resyncs.eligible(lost("a"), server_round):
            resyncs.served("a", server_round)
            served.append(server_round)
    waits = [later - earlier for earlier, later in pairwise(served)]
    assert waits == sorted(waits)
