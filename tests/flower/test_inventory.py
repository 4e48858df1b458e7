"""What clients keep, listed and deleted."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedkd_flwr.flower.inventory import Kept, delete_state, describe_age, kept_states
from fedkd_flwr.flower.retention import REFERENCES_DIR
from fedkd_flwr.flower.store import STATE_FILE, ClientStore
from tests.flower.test_store import STATE, at, flip


def keep(root: Path, training: str, *clients: str, version: int = 4) -> list[ClientStore]:
    stores = [ClientStore(root, training, client) for client in clients]
    for store in stores:
        store.commit(replace(at(version), generation=0))
    return stores


def listed(root: Path) -> list[tuple[str, str, int | None, int]]:
    return [(kept.training_id, kept.client_key, kept.version, kept.replied_round) for kept in kept_states(root)]


def only(root: Path, client: str) -> Kept:
    return next(kept for kept in kept_states(root) if kept.client_key == client)


def test_states_are_listed_by_training_and_client(tmp_path: Path) -> None:
    keep(tmp_path, "t2", "a")
    keep(tmp_path, "t1", "b", "a")
    assert listed(tmp_path) == [("t1", "a", 4, 5), ("t1", "b", 4, 5), ("t2", "a", 4, 5)]


def test_nothing_is_listed_where_nothing_is(tmp_path: Path) -> None:
    assert listed(tmp_path) == listed(tmp_path / "absent") == []


def test_bytes_are_those_of_every_file_and_the_time_is_that_of_the_last_commit(tmp_path: Path) -> None:
    (store,) = keep(tmp_path, "t", "a")
    model = store.directory / "private_model" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"x" * 1000)
    kept = only(tmp_path, "a")
    assert kept.num_bytes == sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    assert kept.num_bytes > 1000
    assert abs((datetime.now() - kept.changed).total_seconds()) < 60


def test_a_client_that_has_not_replied_is_at_round_0(tmp_path: Path) -> None:
    ClientStore(tmp_path, "t", "a").commit(replace(STATE, last_reply=None))
    assert listed(tmp_path) == [("t", "a", 4, 0)]


def test_a_state_that_cannot_be_read_is_listed_and_can_be_deleted(tmp_path: Path) -> None:
    keep(tmp_path, "t", "a")
    (tmp_path / "t" / "a" / STATE_FILE).write_bytes(b"damaged")
    assert listed(tmp_path) == [("t", "a", None, 0)]
    delete_state(only(tmp_path, "a"))
    assert list(tmp_path.iterdir()) == []


def test_deleting_one_client_leaves_the_others_and_what_they_share(tmp_path: Path) -> None:
    keep(tmp_path, "t", "a", "b")
    (tmp_path / "t" / "a" / "private_model").mkdir()
    delete_state(only(tmp_path, "a"))
    assert not (tmp_path / "t" / "a").exists()
    loaded = ClientStore(tmp_path, "t", "b").load()
    assert loaded is not None
    assert loaded.version == 4
    assert len(list((tmp_path / "t" / REFERENCES_DIR).iterdir())) == 1


def test_a_training_that_a_process_works_for_is_not_deleted(tmp_path: Path) -> None:
    (store,) = keep(tmp_path, "t", "a")
    with pytest.raises(OSError, match="works for this training now"):
        delete_state(only(tmp_path, "a"))
    assert store.load() is not None
    del store
    delete_state(only(tmp_path, "a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("age", "says"),
    [
        (timedelta(seconds=3), "now"),
        (timedelta(minutes=5), "5 min"),
        (timedelta(hours=30), "1 d"),
        (timedelta(hours=3), "3 h"),
        (timedelta(days=200), "200 d"),
    ],
)
def test_an_age_is_told_in_its_largest_unit(age: timedelta, says: str) -> None:
    assert describe_age(age) == says


def test_a_version_that_only_the_deleted_client_held_goes_with_it(tmp_path: Path) -> None:
    keep(tmp_path, "t", "a", version=1)
    keep(tmp_path, "t", "b", version=2)
    delete_state(only(tmp_path, "a"))
    assert [path.stem for path in (tmp_path / "t" / REFERENCES_DIR).iterdir()] == [(bytes([2]) * 32).hex()]


def test_the_last_client_takes_the_training_with_it_and_leaves_other_trainings(tmp_path: Path) -> None:
    keep(tmp_path, "t1", "a", "b")
    keep(tmp_path, "t2", "a")
    for kept in [kept for kept in kept_states(tmp_path) if kept.training_id == "t1"]:
        delete_state(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["t2"]


def test_a_client_whose_damaged_state_was_set_aside_is_still_listed(tmp_path: Path) -> None:
    (store,) = keep(tmp_path, "t", "a")
    store.commit(replace(STATE, generation=1))
    flip(store.directory / STATE_FILE)
    assert store.load() is not None  # previous.safetensors still holds a teacher
    assert [kept.client_key for kept in kept_states(tmp_path)] == ["a"]
