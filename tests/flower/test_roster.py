"""Who sits where."""

from typing import Literal

import pytest
from flwr.proto.node_pb2 import NodeInfo

from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.records import HelloReply
from fedkd_flwr.flower.roster import Roster, owners_of


def hello(key: str = "site1", committed_round: int = 0, replied_round: int = 0) -> HelloReply:
    return HelloReply(key, 0, bytes(32), 10, 5, committed_round, replied_round, "all")


def test_the_second_live_node_of_a_name_is_refused_until_the_first_is_gone() -> None:
    roster = Roster(4)
    assert roster.admit(1, hello(), 0, 0, live=[1]) == ""
    assert roster.admit(2, hello(), 0, 0, live=[1, 2]) == "a second live node with this name"
    assert roster.unknown([1, 2]) == []
    assert roster.unknown([2]) == [2]
    assert roster.admit(2, hello(), 0, 0, live=[2]) == ""
    assert [seat.node_id for seat in roster.available([2])] == [2]


def test_a_node_that_changes_its_name_keeps_one_seat() -> None:
    roster = Roster(4)
    roster.admit(1, hello("a"), 0, 0, live=[1])
    roster.doubt("a")
    roster.admit(1, hello("b"), 0, 0, live=[1])
    assert [seat.client_key for seat in roster.available([1])] == ["b"]


def test_a_restarted_client_keeps_its_counted_round_and_one_that_lost_its_disk_does_not() -> None:
    for rounds, expected in (((7, 9), 7), ((6, 7), 7), ((0, 0), 0), ((5, 6), 0)):
        roster = Roster(4)
        roster.admit(1, hello(), 0, 0, live=[1])
        roster.counted("site1", 7)
        roster.admit(2, hello("site1", *rounds), 0, 0, live=[2])
        assert roster.available([2])[0].counted_round == expected


def test_a_client_in_doubt_is_asked_again_before_it_gets_work() -> None:
    roster = Roster(4)
    roster.admit(1, hello(), 0, 0, live=[1])
    roster.doubt("site1")
    assert roster.available([1]) == []
    assert roster.unknown([1]) == [1]


def test_a_refused_node_whose_rival_changes_its_name_is_asked_again() -> None:
    roster = Roster(4)
    roster.admit(1, hello("a"), 0, 0, live=[1])
    assert roster.admit(2, hello("a"), 0, 0, live=[1, 2])
    roster.doubt("a")
    roster.admit(1, hello("b"), 0, 0, live=[1, 2])
    assert roster.unknown([1, 2]) == [2]
    assert roster.admit(2, hello("a"), 0, 0, live=[1, 2]) == ""


def test_a_name_left_behind_keeps_what_is_known_of_it() -> None:
    roster = Roster(4)
    roster.admit(1, hello("a"), 0, 0, live=[1])
    roster.sent("a", 7)
    for name in ("b", "a"):
        roster.doubt("a" if name == "b" else "b")
        roster.admit(1, hello(name), 0, 7, live=[1])
    seat = roster.seat("a")
    assert seat is not None
    assert seat.needs_resync


def test_no_more_names_than_clients_at_a_time_and_not_many_more_in_all() -> None:
    roster = Roster(2)
    assert roster.admit(1, hello("a"), 0, 0, live=[1, 2, 3]) == ""
    assert roster.admit(2, hello("b"), 0, 0, live=[1, 2, 3]) == ""
    assert roster.admit(3, hello("c"), 0, 0, live=[1, 2, 3]) == "a client more than num_clients"
    assert roster.unknown([1, 2, 3]) == []
    assert roster.unknown([1, 3]) == [3]
    assert roster.admit(3, hello("c"), 0, 0, live=[1, 3]) == ""
    admitted = [roster.admit(node, hello(f"x{node}"), 0, 0, live=[1, node]) for node in range(4, 20)]
    assert admitted.count("") == 5


def test_connected_clients_are_counted_by_version_and_absent_ones_named() -> None:
    roster = Roster(9)
    live = range(1, 7)
    for node_id, version in zip(live, (10, 9, 10, None, 10, 2), strict=True):
        roster.admit(node_id, hello(f"site{node_id}"), version, 10, live)
    roster.doubt("site5")
    assert list(roster.online([1, 2, 3, 4, 5]).items()) == [("9", 1), ("10", 2), ("unknown", 2)]
    assert roster.offline([1, 2, 3, 4, 5]) == ["site6"]
    assert roster.online([]) == {}


OTHER_KEY = "a node with another key than the one that had this name first"


def test_a_name_belongs_to_the_key_that_had_it_first_also_while_its_node_is_away() -> None:
    roster = Roster(4)
    assert roster.admit(1, hello(), 0, 0, live=[1], owner="key1") == ""
    for owner in ("key2", ""):
        assert roster.admit(2, hello(), 0, 0, live=[2], owner=owner) == OTHER_KEY
        assert roster.unknown([2]) == [], "it is not asked again and again"
    again = Roster(4)
    again.restore(roster.saved())
    assert again.admit(2, hello(), 0, 0, live=[2], owner="key2") == OTHER_KEY
    assert again.admit(9, hello(), 0, 0, live=[2, 9], owner="key1") == "", "under another node id"


@pytest.mark.parametrize("released", [("site1",), None])
def test_a_released_name_goes_to_the_next_key_that_claims_it_and_stays_there(released: tuple[str, ...] | None) -> None:
    first = Roster(4)
    first.admit(1, hello(), 0, 0, live=[1], owner="lost")
    second = Roster(4, released)
    second.restore(first.saved())
    assert second.admit(2, hello(), 0, 0, live=[2], owner="new") == ""
    assert second.admit(3, hello(), 0, 0, live=[3], owner="third") == OTHER_KEY


def test_a_released_name_that_nobody_had_is_refused_with_those_that_there_are() -> None:
    first = Roster(4)
    first.admit(1, hello("site1"), 0, 0, live=[1], owner="lost")
    words = r"server\.release_names must be names of this run's clients \(site1\), got 'sit1'"
    with pytest.raises(RunError, match=words):
        Roster(4, ("site1", "sit1")).restore(first.saved())


def test_one_node_can_have_a_few_names_and_leaves_the_others_theirs() -> None:
    for owner in ("key1", ""):
        roster = Roster(50)
        refusals = [roster.admit(1, hello(f"x{number}"), 0, 0, live=[1], owner=owner) for number in range(300)]
        assert refusals.count("") == 4 and set(refusals[4:]) == {"a node that has had 4 names"}
        assert roster.admit(1, hello("x0"), 0, 0, live=[1], owner=owner) == "", "its own it may have again"
        assert not any(roster.admit(n, hello(f"site{n}"), 0, 0, range(2, 51), owner=f"k{n}") for n in range(2, 51))


@pytest.mark.parametrize(("bind", "bound"), [("registered", {1, 2}), ("all", {1, 2, 3}), ("none", set())])
def test_names_are_bound_to_keys_that_last(bind: Literal["registered", "all", "none"], bound: set[int]) -> None:
    nodes = [
        NodeInfo(node_id=1, public_key=b"one", name="site1"),
        NodeInfo(node_id=2, public_key=b"two", name="site2"),
        NodeInfo(node_id=3, public_key=b"drawn at the start"),
        NodeInfo(node_id=4),
    ]
    owners = owners_of(nodes, bind)
    assert owners.keys() == bound
    assert len(set(owners.values())) == len(bound)
