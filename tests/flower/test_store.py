"""Client state on disk."""

import os
import resource
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedkd_flwr.flower.archive import read_archive
from fedkd_flwr.flower.client_state import UNKNOWN_VERSION, ClientState, LastReply
from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.retention import REFERENCES_DIR
from fedkd_flwr.flower.store import (
    FORMAT,
    REFERENCE_FORMAT,
    STATE_FILE,
    ClientStore,
)
from tests.flower.test_archive import full_disk

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


# Shared arrays, once on a machine

TRAINING = "0123456789abcdef"


def clients(tmp_path: Path, *keys: str) -> list[ClientStore]:
    return [ClientStore(tmp_path, TRAINING, key) for key in keys]


def at(version: int, state: ClientState = STATE) -> ClientState:
    """The state at another version: other shared arrays under another lineage."""
    shared = {name: value + np.asarray(version, value.dtype) for name, value in STATE.shared.items()}
    return replace(state, version=version, lineage=bytes([version]) * 32, shared=shared)


def pooled(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / TRAINING / REFERENCES_DIR).iterdir())


def own(store: ClientStore) -> list[Path]:
    return sorted(store.directory.glob("reference-*"))


def flip(path: Path) -> None:
    """Damage a file in place; links to it see it too."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_clients_at_the_same_version_share_one_file(tmp_path: Path) -> None:
    stores = clients(tmp_path, "a", "b", "c")
    for store in stores:
        store.commit(at(1))
    files = [*pooled(tmp_path), *(path for store in stores for path in own(store))]
    assert len(files) == 4
    assert len({path.stat().st_ino for path in files}) == 1
    for store in stores:
        loaded = store.load()
        assert loaded is not None
        assert same(loaded, replace(at(1), generation=1))


def test_a_version_that_nobody_holds_any_more_leaves_the_disk(tmp_path: Path) -> None:
    first, second = clients(tmp_path, "a", "b")
    states = [store.commit(at(1)) for store in (first, second)]
    first.commit(at(2, states[0]))
    assert len(pooled(tmp_path)) == 2  # the second still stands at the older one
    second.commit(at(2, states[1]))
    assert [path.stem for path in pooled(tmp_path)] == [(bytes([2]) * 32).hex()]
    assert [len(own(store)) for store in (first, second)] == [1, 1]
    assert {path.name for path in tmp_path.rglob("*") if "partial" in path.name} == set()


def test_a_client_whose_rival_left_the_version_keeps_its_own_link(tmp_path: Path) -> None:
    first, second = clients(tmp_path, "a", "b")
    first.commit(at(1))
    shutil.rmtree(tmp_path / TRAINING / REFERENCES_DIR)
    (tmp_path / TRAINING / REFERENCES_DIR).mkdir()
    second.commit(at(1))
    assert len(pooled(tmp_path)) == 1
    for store in (first, second):
        loaded = store.load()
        assert loaded is not None
        assert loaded.version == 1


def test_a_disk_without_links_holds_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        if not Path(source).exists():
            raise FileNotFoundError(2, "No such file or directory")
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refused)
    first, second = clients(tmp_path, "a", "b")
    states = [store.commit(at(1)) for store in (first, second)]
    for store, state in zip((first, second), states, strict=True):
        store.commit(at(2, state))
        loaded = store.load()
        assert loaded is not None
        assert same(loaded, replace(at(2), generation=2))


def test_a_training_without_shared_arrays_is_kept_too(store: ClientStore) -> None:
    store.commit(replace(STATE, shared={}, downlink={}))
    loaded = store.load()
    assert loaded is not None
    assert (loaded.version, loaded.shared) == (4, {})


# Damage


def test_of_a_damaged_state_the_last_good_teacher_is_kept_and_the_rest_is_asked_for(store: ClientStore) -> None:
    teachers = [{"teacher/w": np.full(2, number, np.float32)} for number in (1, 2)]
    first = store.commit(replace(STATE, private=teachers[0]))
    store.commit(replace(first, private=teachers[1]))
    flip(store.directory / STATE_FILE)
    salvaged = store.load()
    assert salvaged is not None
    assert salvaged.version == UNKNOWN_VERSION
    assert np.array_equal(salvaged.private["teacher/w"], teachers[0]["teacher/w"])
    assert (salvaged.shared, salvaged.committed, salvaged.pending, salvaged.downlink) == ({}, {}, {}, {})
    assert (salvaged.last_reply, salvaged.committed_round, salvaged.generation) == (None, 0, 0)
    assert store.commit(replace(at(1), private=salvaged.private)).generation == 1
    loaded = store.load()
    assert loaded is not None
    assert same(loaded, replace(at(1), private=teachers[0], generation=1))


def test_the_teacher_of_a_damaged_state_is_found_until_the_next_commit(store: ClientStore) -> None:
    store.commit(store.commit(STATE))
    flip(store.directory / STATE_FILE)
    for _ in range(2):  # hello, then train
        salvaged = store.load()
        assert salvaged is not None
        assert salvaged.private.keys() == STATE.private.keys()


def test_where_both_generations_are_damaged_the_client_starts_afresh(store: ClientStore) -> None:
    store.commit(store.commit(STATE))
    for path in store.directory.glob("*.safetensors"):
        flip(path)
    assert store.load() is None


def test_a_damaged_or_missing_reference_costs_the_shared_arrays_alone(tmp_path: Path) -> None:
    for key, spoil in (("a", flip), ("b", os.unlink)):
        (store,) = clients(tmp_path, key)
        store.commit(STATE)
        spoil(own(store)[0])
        loaded = store.load()
        assert loaded is not None
        assert same(loaded, replace(STATE, version=UNKNOWN_VERSION, shared={}, generation=1))
        assert own(store) == []
        assert all(read_archive(path, REFERENCE_FORMAT) for path in pooled(tmp_path))
        store.commit(replace(STATE, generation=1))
        again = store.load()
        assert again is not None
        assert same(again, replace(STATE, generation=2))


def test_a_damaged_reference_that_is_shared_is_found_by_each_client(tmp_path: Path) -> None:
    stores = clients(tmp_path, "a", "b")
    for store in stores:
        store.commit(STATE)
    flip(pooled(tmp_path)[0])
    for store in stores:
        loaded = store.load()
        assert loaded is not None
        assert loaded.version == UNKNOWN_VERSION
        store.commit(replace(STATE, generation=1))
    for store in stores:
        healed = store.load()
        assert healed is not None
        assert healed.version == 4


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    here, there = ClientStore(tmp_path, "here", "a"), ClientStore(tmp_path, "there", "a")
    here.commit(STATE)
    shutil.copy(here.directory / STATE_FILE, there.directory / STATE_FILE)
    with pytest.raises(StateError, match=r"is of training here, not of there; delete it"):
        there.load()
    assert (there.directory / STATE_FILE).exists()


def test_a_state_of_an_older_format_is_set_aside_by_name(store: ClientStore, caplog: pytest.LogCaptureFixture) -> None:
    from fedkd_flwr.flower.archive import Archive, write_archive

    write_archive(store.directory / STATE_FILE, "fedkd client state 1", Archive())
    assert store.load() is None
    assert f"format must be {FORMAT!r}, got 'fedkd client state 1'" in caplog.text


# Disks that refuse


def test_a_full_disk_leaves_the_last_state_with_its_reference(store: ClientStore) -> None:
    first = store.commit(STATE)
    larger = replace(at(5, first), private={"teacher/w": np.zeros(100_000, np.float32)})
    with full_disk(4000), pytest.raises(StateError, match="client state can't be written"):
        store.commit(larger)
    loaded = store.load()
    assert loaded is not None
    assert same(loaded, first)
    assert store.commit(larger).generation == 2


def test_a_state_directory_that_cannot_be_made_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    for root in ("/proc", "/dev/null"):
        with pytest.raises(StateError, match="state-dir: no directory can be made in it") as caught:
            ClientStore(Path(root) / "state", TRAINING, "a")
        assert root not in str(caught.value)
        assert f"{root}/state/{TRAINING}" in caplog.text


@pytest.mark.parametrize("stage", ["open", "save_file", "flock"])
def test_what_the_server_reads_of_a_disk_does_not_say_where_it_is(
    stage: str, store: ClientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit(STATE)

    def refused(*arguments: object, **_: object) -> None:
        raise OSError(5, "Input/output error", str(store.directory / STATE_FILE))

    target = {
        "open": "pathlib.Path.open",
        "save_file": "fedkd_flwr.flower.archive.save_file",
        "flock": "os.open",
    }[stage]
    monkeypatch.setattr(target, refused)
    with pytest.raises(StateError, match="Input/output error") as caught:
        store.commit(at(5, replace(STATE, generation=1)))
    report = "".join(traceback.format_exception(caught.value)).splitlines()
    assert not any(str(store.directory) in line for line in report if not line.startswith("  "))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(store: ClientStore) -> None:
    first = store.commit(STATE)
    store.directory.chmod(0o500)
    try:
        with pytest.raises(StateError, match="client state can't be written"):
            store.commit(first)
        loaded = store.load()
        assert loaded is not None
        assert same(loaded, first)
    finally:
        store.directory.chmod(0o700)


def test_a_directory_without_a_lock_is_refused(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.open", refused)
    with pytest.raises(StateError, match="client state can't be locked: Read-only file system"):
        store.load()


@contextmanager
def few_files_left(num_files: int) -> Iterator[None]:
    """This process may open only so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    opened: list[int] = []
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(num_files):
            os.close(opened.pop())
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_state_that_cannot_be_opened_just_now_is_not_taken_for_none(store: ClientStore) -> None:
    store.commit(STATE)
    with few_files_left(1), pytest.raises(StateError):  # enough for the lock
        store.load()


def test_the_folder_of_references_is_no_client(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="and not 'references'"):
        ClientStore(tmp_path, TRAINING, REFERENCES_DIR)


def test_clients_that_commit_at_the_same_time_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    children = []
    for client in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store = ClientStore(tmp_path, "0123456789abcdef", f"{client:05d}")
                state = store.load() or replace(STATE, generation=0)
                for version in range(150):
                    lineage = version.to_bytes(32, "little")
                    state = store.commit(replace(state, version=version, lineage=lineage))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    for client in range(4):
        loaded = ClientStore(tmp_path, "0123456789abcdef", f"{client:05d}").load()
        assert loaded is not None
        assert loaded.version == 149
