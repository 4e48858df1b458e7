"""How long a node keeps state, and how much: what goes, what stays, and what is refused."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from fedkd_flwr.flower import retention
from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.retention import LOCK_FILE, Retention, delete_training, hold, size_on_disk, trainings
from fedkd_flwr.flower.store import PREVIOUS_FILE, STATE_FILE, ClientStore
from tests.flower.test_store import STATE

DAY = 86_400.0
NUMBERS = 30_000  # of a private model: 120 kB
STATE_BYTES = 4 * NUMBERS


def state(value: float, numbers: int = NUMBERS) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {"w": np.full(numbers, value, np.float32)}


def keep(root: Path, training: str, *, days: float = 0.0, client: str = "a", numbers: int = NUMBERS) -> None:
    """Let a client have committed once, so many days ago."""
    ClientStore(root, training, client).commit(replace(STATE, private=state(1, numbers)))
    used(root / training, days)


def used(training: Path, days: float) -> None:
    for path in (*training.iterdir(), training):
        os.utime(path, (time.time() - days * DAY,) * 2)


def there(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.name != LOCK_FILE}


# Age


def test_a_training_that_nobody_has_used_for_longer_than_the_limit_goes_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, days in (("young", 2.0), ("old", 31.0), ("older", 400.0)):
        keep(tmp_path, name, days=days)
    with caplog.at_level(logging.WARNING, "fedkd"):
        ClientStore(tmp_path, "running", "a", Retention(max_age_days=30))
    assert there(tmp_path) == {"young", "running"}
    assert [record.args[0] for record in caplog.records if record.args] == ["older", "old"]
    assert "state-max-age-days is 30" in caplog.text


def test_half_a_year_is_the_limit_unless_told_otherwise_and_0_is_none(tmp_path: Path) -> None:
    keep(tmp_path, "recent", days=170.0)
    keep(tmp_path, "old", days=190.0)
    ClientStore(tmp_path, "running", "a", Retention(max_age_days=0))
    assert there(tmp_path) == {"recent", "old", "running"}
    ClientStore(tmp_path, "running", "a")
    assert there(tmp_path) == {"recent", "running"}


def test_the_training_that_goes_on_stays_whatever_its_age(tmp_path: Path) -> None:
    keep(tmp_path, "running", days=400.0)
    assert ClientStore(tmp_path, "running", "a", Retention(max_age_days=1)).load() is not None


def test_a_message_of_one_client_does_not_look_at_all_the_others_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, "other", days=1.0)
    keep(tmp_path, "running")
    looked_at: list[str] = []
    look = retention._last_used
    monkeypatch.setattr(retention, "_last_used", lambda path: looked_at.append(path.name) or look(path))
    ClientStore(tmp_path, "running", "a")
    assert looked_at == ["other"]


def test_a_training_in_the_hands_of_a_process_is_never_deleted(tmp_path: Path) -> None:
    keep(tmp_path, "busy", days=400.0)
    held = ClientStore(tmp_path, "busy", "a")
    used(tmp_path / "busy", 400.0)
    ClientStore(tmp_path, "running", "b")
    assert "busy" in there(tmp_path)
    del held
    used(tmp_path / "busy", 400.0)
    ClientStore(tmp_path, "running", "b")
    assert there(tmp_path) == {"running"}


@pytest.mark.parametrize("stranger", ["data/train.csv", "notes.txt", "photos/2019/a.jpg"])
def test_a_folder_that_is_no_trainings_is_left_alone(tmp_path: Path, stranger: str) -> None:
    """Somebody may have pointed state-dir at a folder with other things in it."""
    file = tmp_path / "mine" / stranger
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    used(tmp_path / "mine", 999.0)
    store = ClientStore(tmp_path, "running", "a", Retention(max_age_days=1, max_bytes=400_000))
    with pytest.raises(StateError, match="state-max-bytes"):
        store.commit(replace(STATE, private=state(1, 10 * NUMBERS)))
    assert file.read_text() == "mine"


def test_what_a_killed_deletion_left_goes_with_the_next_message(tmp_path: Path) -> None:
    (tmp_path / ".deleted-00000000" / "a").mkdir(parents=True)
    ClientStore(tmp_path, "running", "a")
    assert there(tmp_path) == {"running"}


def test_a_training_is_deleted_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, "old", days=400.0)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before the first file went
    assert delete_training(tmp_path / "old")
    assert "old" not in there(tmp_path)
    assert trainings(tmp_path) == []


# Quota


def test_room_is_made_by_the_trainings_used_longest_ago_and_no_more_than_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, days in (("c", 1.0), ("a", 3.0), ("b", 2.0)):
        keep(tmp_path, name, days=days)
    quota = size_on_disk([tmp_path]) + 1000
    with caplog.at_level(logging.WARNING, "fedkd"):
        ClientStore(tmp_path, "running", "a", Retention(max_bytes=quota)).commit(replace(STATE, private=state(2)))
    assert there(tmp_path) == {"c", "running"}  # of three equal ones, two had to go
    assert f"to keep within state-max-bytes {quota}" in caplog.text
    assert size_on_disk([tmp_path]) <= quota


def test_nothing_is_deleted_while_there_is_room(tmp_path: Path) -> None:
    keep(tmp_path, "old", days=100.0)
    ClientStore(tmp_path, "running", "a", Retention(max_bytes=10**9)).commit(replace(STATE, private=state(2)))
    assert there(tmp_path) == {"old", "running"}


def test_where_even_the_running_training_does_not_fit_one_reason_says_so_and_nothing_is_lost(tmp_path: Path) -> None:
    keep(tmp_path, "running")
    store = ClientStore(tmp_path, "running", "a", Retention(max_bytes=2 * STATE_BYTES))
    before = store.load()
    assert before is not None
    with pytest.raises(StateError, match=r"state-max-bytes: must be at least \d+ on this node, got 240000: ") as caught:
        store.commit(replace(before, private=state(2)))
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    after = store.load()
    assert after is not None
    assert after.generation == before.generation
    least = int(str(caught.value).split("at least ")[1].split()[0])
    del store
    ClientStore(tmp_path, "running", "a", Retention(max_bytes=least)).commit(replace(before, private=state(2)))


def test_a_training_used_within_the_hour_may_be_between_two_rounds_and_stays(tmp_path: Path) -> None:
    keep(tmp_path, "other", days=0.01)
    store = ClientStore(tmp_path, "running", "a", Retention(max_bytes=2 * STATE_BYTES))
    with pytest.raises(StateError, match=r"trainings in use have 1\d{5}"):
        store.commit(replace(STATE, private=state(2)))
    used(tmp_path / "other", 0.05)
    store.commit(replace(STATE, private=state(2)))
    assert there(tmp_path) == {"running"}


def test_a_file_with_several_names_counts_once(tmp_path: Path) -> None:
    keep(tmp_path, "t", client="a")
    keep(tmp_path, "t", client="b")
    [reference] = (tmp_path / "t" / "references").iterdir()
    assert reference.stat().st_nlink == 3
    shown = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size_on_disk([tmp_path]) == shown - 2 * reference.stat().st_size


def test_a_private_model_is_replaced_whole_within_the_quota(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "t", "a", Retention(max_bytes=200_000))

    def model(text: str) -> Callable[[Path], None]:
        def write(directory: Path) -> None:
            directory.mkdir()
            (directory / "model").write_text(text)

        return write

    store.export("private_model", state(1, 10), model("old"))
    with pytest.raises(StateError, match="state-max-bytes"):
        store.export("private_model", state(1, 100_000), model("too large"))

    def broken(directory: Path) -> None:
        directory.mkdir()
        raise OSError(28, "No space left on device", str(directory))

    with pytest.raises(OSError, match="No space left on device"):
        store.export("private_model", state(1, 10), broken)
    assert (store.directory / "private_model" / "model").read_text() == "old"


# Several processes on one directory


def work(root: Path, training: str, quota: int, commits: int) -> None:
    """Commit to a training again and again, as a process for each message does; what is found must be the last one."""
    for number in range(commits):
        store = ClientStore(root, training, "a", Retention(max_age_days=1, max_bytes=quota))
        found = store.load()
        if number and (found is None or found.private["w"][0] != number - 1):
            raise SystemExit(f"{training}: commit {number} found {found and found.private['w'][0]}")
        store.commit(replace(found or STATE, private=state(number, 1000)))


def test_three_processes_on_one_directory_lose_nothing_and_stay_within_the_quota(tmp_path: Path) -> None:
    for number in range(6):
        keep(tmp_path, f"old{number}", days=100.0 if number % 2 else 0.5, numbers=1000)
    quota = 75_000  # what three trainings need at most, and two of the old ones
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [
        context.Process(target=work, args=(tmp_path, f"t{number}", quota, 15)) for number in range(3)
    ]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        largest = max(largest, size_on_disk([tmp_path]))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {"t0", "t1", "t2"} <= there(tmp_path)
    assert not there(tmp_path) & {"old1", "old3", "old5"}
    assert largest <= quota


def test_a_training_that_is_deleted_while_another_process_takes_it_up_is_made_anew_or_kept(tmp_path: Path) -> None:
    """Whoever holds a training finds its folder in place until he lets go."""
    training = tmp_path / "t"
    stop: list[bool] = []

    def delete() -> None:
        while not stop:
            if training.exists():
                delete_training(training)

    deleting = Thread(target=delete)
    deleting.start()
    try:
        for _ in range(200):
            descriptor = hold(training)
            try:
                (training / "mark").write_text("here")
                assert (training / "mark").read_text() == "here"
                assert os.path.samestat(os.fstat(descriptor), os.stat(training / LOCK_FILE))
                (training / "mark").unlink()
            finally:
                os.close(descriptor)
    finally:
        stop.append(True)
        deleting.join()


# On the disk


def test_the_folders_of_a_first_commit_are_on_the_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClientStore(tmp_path / "deep" / "state", "t", "a")
    synced: list[Path] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", recorded)
    first = store.commit(STATE)
    folders = [store.directory, store.directory.parent, tmp_path / "deep" / "state", tmp_path / "deep"]
    assert set(folders) <= set(synced)
    synced.clear()
    store.commit(first)
    assert tmp_path / "deep" not in synced  # they are there already
    assert (store.directory / STATE_FILE).exists()
    assert (store.directory / PREVIOUS_FILE).exists()
