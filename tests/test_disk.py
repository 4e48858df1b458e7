"""What is replaced whole, what is on the disk when, and which directory is named when one can't be written."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fedkd_flwr import disk
from fedkd_flwr.disk import (
    UnwritableError,
    make_directory,
    refuse_unwritable,
    replacing,
    write_directory,
    write_problem,
    write_whole,
)

Recorder = list[tuple[str, str]]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Names of what is made durable and renamed, in this order."""
    said: Recorder = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        said.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        said.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr("os.fsync", recorded_fsync)
    monkeypatch.setattr("os.replace", recorded_replace)
    return said


def fail(*_: object, **__: object) -> None:
    raise FULL


def tree(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_content_then_rename_then_folder_reach_the_disk(tmp_path: Path, calls: Recorder) -> None:
    write_whole(tmp_path / "table.md", "new")
    assert [kind for kind, _ in calls] == ["fsync", "rename", "fsync"]
    assert calls[0][1].endswith(".partial.md")
    assert calls[1:] == [("rename", "table.md"), ("fsync", tmp_path.name)]
    assert (tmp_path / "table.md").read_text() == "new"


@pytest.mark.parametrize("stage", ["os.fsync", "os.replace"])
def test_a_write_that_ends_in_between_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    file = tmp_path / "table.md"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(stage, fail)
        with pytest.raises(OSError, match="No space left") as caught:
            write_whole(file, "new")
    assert caught.value.filename == str(file)
    assert tree(tmp_path) == {"table.md": "old"}


def test_a_file_is_made_as_the_umask_says_and_keeps_who_may_read_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "1")
    before = os.umask(0)
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~before
    (tmp_path / "a").chmod(0o600)
    write_whole(tmp_path / "a", "2")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.md").write_text("old")
    (tmp_path / "a.md").symlink_to(tmp_path / "real" / "a.md")
    write_whole(tmp_path / "a.md", "new")
    assert (tmp_path / "a.md").is_symlink()
    assert (tmp_path / "real" / "a.md").read_text() == "new"


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_another_writes_now_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "a[1].png") as now:
        old = tmp_path / ".a[1].00000000.partial.png"
        old.write_text("half")
        os.utime(old, (0, 0))
        write_whole(tmp_path / "a[1].png", "whole")
        assert now.exists()
        assert not old.exists()


def filled(**files: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "inner").mkdir(parents=True)
        for name, text in files.items():
            (directory / "inner" / name).write_text(text)

    return write


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on a system that has none
        monkeypatch.setattr(disk, "_exchanged", lambda *_: False)
    write_directory(tmp_path / "student", filled(a="old", b="old"))
    write_directory(tmp_path / "student", filled(a="new"))
    assert tree(tmp_path) == {"student/inner/a": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_directory_whose_writing_fails_is_as_it_was(tmp_path: Path) -> None:
    write_directory(tmp_path / "student", filled(a="old"))

    def half(directory: Path) -> None:
        filled(a="new")(directory)
        raise FULL

    with pytest.raises(OSError, match="No space left"):
        write_directory(tmp_path / "student", half)
    assert tree(tmp_path) == {"student/inner/a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_directory_of_which_nothing_is_written_any_more_goes(tmp_path: Path) -> None:
    write_directory(tmp_path / "student", filled(a="old"))
    write_directory(tmp_path / "student", lambda directory: False)
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_a_directory_is_on_the_disk_before_it_is_in_place(tmp_path: Path, calls: Recorder) -> None:
    write_directory(tmp_path / "student", filled(a="1", b="2"))
    assert {name for _, name in calls[:4]} >= {"a", "b", "inner"}
    assert calls[-1] == ("fsync", tmp_path.name)


def test_parents_that_are_made_are_made_durable(tmp_path: Path, calls: Recorder) -> None:
    make_directory(tmp_path / "a" / "b" / "c", 0o700)
    assert calls == [("fsync", tmp_path.name), ("fsync", "a"), ("fsync", "b")]
    assert stat.S_IMODE((tmp_path / "a" / "b" / "c").stat().st_mode) == 0o700
    make_directory(tmp_path / "a" / "b" / "c")
    assert len(calls) == 3


# Directories of the libraries

VARIABLES = ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def wrapped(error: Exception) -> Exception:
    """As libraries raise it: an error of their own, with the cause behind it."""
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("the data can't be generated") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("HOME", "HF_HOME or HF_DATASETS_CACHE"),
        ("HF_HOME", "HF_HOME or HF_DATASETS_CACHE"),
        ("HF_DATASETS_CACHE", "HF_HOME or HF_DATASETS_CACHE"),
        ("HF_HUB_CACHE", "HF_HOME or HF_HUB_CACHE"),
        ("MPLCONFIGDIR", "MPLCONFIGDIR"),
        ("XDG_CONFIG_HOME", "MPLCONFIGDIR"),
    ],
)
def test_a_cache_that_can_not_be_written_is_named_with_the_variable_that_moves_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, names: str
) -> None:
    monkeypatch.setenv(variable, "/dev/null/there")
    with pytest.raises(UnwritableError, match=rf"'/dev/null/there.*Not a directory; set {names} to one that can"):
        refuse_unwritable(wrapped(NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/there")))


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file"), ValueError("no such split"), ConnectionError("offline")],
)
def test_an_error_of_another_kind_is_not_put_down_to_a_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/null/there")
    refuse_unwritable(wrapped(error))


def test_a_file_of_the_data_that_may_not_be_read_is_not_put_down_to_a_cache_that_can_be_written(home: Path) -> None:
    refuse_unwritable(wrapped(PermissionError(errno.EACCES, "Permission denied", "/srv/data/train.csv")))


def test_a_full_disk_is_found_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_problem(tmp_path / "not" / "there") == ""
    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    assert write_problem(tmp_path) == "No space left on device"
