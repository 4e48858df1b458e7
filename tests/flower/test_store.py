"""Client state on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.store import STATE_FILE, ClientState, ClientStore, LastReply

STATE = ClientState(
    version=4,
    lineage=bytes(range(32)),
    shared={"w": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7)},
    private={"teacher/w": np.ones(2, np.float32)},
    committed={"residual/w": np.zeros(3, np.float32)},
    pending={"residual/w": np.ones(3, np.float32)},
    downlink={},
    last_reply=LastReply(5, bytes(32), b"payload", {"num_examples": 3, "shared": {"accuracy": 0.5}}),
)


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path, "0123456789abcdef", "00001")


def same(a: ClientState, b: ClientState) -> bool:
    groups = ("shared", "private", "committed", "pending", "downlink")
    for group in groups:
        x, y = getattr(a, group), getattr(b, group)
        if x.keys() != y.keys() or not all(np.array_equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x):
            return False
    facts = ("version", "lineage", "last_reply", "committed_round", "generation")
    return all(getattr(a, fact) == getattr(b, fact) for fact in facts)


def test_what_is_committed_is_loaded(store: ClientStore) -> None:
    committed = store.commit(STATE)
    loaded = store.load()
    assert loaded is not None
    assert same(loaded, committed)
    assert loaded.generation == 1


def test_a_new_client_has_no_state(store: ClientStore) -> None:
    assert store.load() is None


def test_a_late_process_cannot_overwrite_a_newer_state(store: ClientStore) -> None:
    store.commit(STATE)
    with pytest.raises(StateError, match="another process"):
        store.commit(STATE)
    loaded = store.load()
    assert loaded is not None
    assert loaded.generation == 1


def test_a_damaged_file_is_set_aside_and_the_client_starts_afresh(store: ClientStore) -> None:
    store.commit(STATE)
    path = store.directory / STATE_FILE
    path.write_bytes(path.read_bytes()[:100])
    assert store.load() is None
    assert path.with_suffix(".damaged").exists()
    assert store.commit(STATE).generation == 1


def test_an_interrupted_write_leaves_the_last_state(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.commit(STATE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="No space left"):
        store.commit(replace(first, version=9))
    loaded = store.load()
    assert loaded is not None
    assert loaded.version == 4


@pytest.mark.parametrize("name", ["../etc", "a/b", "", ".", "x" * 100, "a b"])
def test_names_that_are_not_safe_as_folders_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateError, match="client key must be"):
        ClientStore(tmp_path, "0123456789abcdef", name)


def test_pending_becomes_committed_when_its_reply_counted() -> None:
    settled = STATE.settle(5, {})
    assert settled.committed is STATE.pending
    assert settled.committed_round == 5


def test_pending_is_dropped_when_its_reply_did_not_count() -> None:
    settled = replace(STATE, committed_round=4).settle(4, {})
    assert settled.committed is STATE.committed
    assert settled.pending is STATE.committed


def test_codec_state_begins_again_where_the_server_counts_from_the_beginning() -> None:
    initial = {"residual/w": np.zeros(3, np.float32)}
    settled = STATE.settle(0, initial)
    assert (settled.committed, settled.pending, settled.committed_round) == (initial, initial, 0)


def test_a_counted_reply_that_the_client_does_not_remember_is_refused() -> None:
    with pytest.raises(StateError, match="no codec state after its reply of round 3"):
        STATE.settle(3, {})
