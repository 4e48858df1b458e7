"""One file, whole or refused."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedkd_flwr.core.arrays import Array
from fedkd_flwr.flower import archive as archive_module
from fedkd_flwr.flower.archive import Archive, ArchiveError, read_archive, read_facts, write_archive

KIND = "test 1"
SMALL = Archive(
    {"round": 7, "who": "größer", "nothing": None},
    {"w": np.arange(3, dtype=np.float32), "a": np.zeros(0), "c": np.zeros(0), "steps": np.array(7), "flag": np.True_},
)
DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def same(a: Archive, b: Archive) -> bool:
    def alike(x: Array, y: Array) -> bool:
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    names = a.arrays.keys()
    return a.facts == b.facts and names == b.arrays.keys() and all(alike(a.arrays[n], b.arrays[n]) for n in names)


def written(path: Path, archive: Archive = SMALL) -> Path:
    write_archive(path, KIND, archive)
    return path


@contextmanager
def full_disk(num_bytes: int = 100) -> Iterator[None]:
    """No file of this process may grow above so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@settings(max_examples=60, deadline=None)
@given(facts=st.dictionaries(st.text(), JSON, max_size=4), arrays=st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_what_is_written_is_read_back_to_the_last_bit(facts: dict[str, Any], arrays: dict[str, Array]) -> None:
    with TemporaryDirectory() as directory:
        path = written(Path(directory) / "file", Archive(facts, arrays))
        assert same(read_archive(path, KIND), Archive(facts, arrays))
        assert read_facts(path, KIND) == facts
        assert os.listdir(directory) == ["file"]


def test_a_view_that_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    views = {"transposed": matrix.T, "strided": matrix[::2, ::-1], "broadcast": np.broadcast_to(matrix[0], (2, 4))}
    found = read_archive(written(tmp_path / "file", Archive({}, views)), KIND).arrays
    assert all(np.array_equal(found[name], view) for name, view in views.items())


def test_arrays_that_are_read_are_the_readers_own(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    found = read_archive(path, KIND).arrays["w"]
    path.write_bytes(b"")
    assert np.array_equal(found, SMALL.arrays["w"])


def test_any_single_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ArchiveError):
            read_archive(path, KIND)
    path.write_bytes(whole)
    assert same(read_archive(path, KIND), SMALL)


def test_any_truncation_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArchiveError):
            read_archive(path, KIND)


def test_bytes_that_follow_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArchiveError):
        read_archive(path, KIND)


@pytest.mark.parametrize("read", [read_archive, read_facts])
def test_another_format_is_refused_by_name(tmp_path: Path, read: Callable[[Path, str], object]) -> None:
    path = written(tmp_path / "file")
    with pytest.raises(ArchiveError, match="format must be 'test 2', got 'test 1'"):
        read(path, "test 2")


@pytest.mark.parametrize("read", [read_archive, read_facts])
@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b"\xff" * 100, b"\2\0\0\0\0\0\0\0{}"])
def test_something_else_is_refused(tmp_path: Path, read: Callable[[Path, str], object], content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArchiveError):
        read(path, KIND)


@pytest.mark.parametrize("read", [read_archive, read_facts])
def test_no_file_is_told_apart_from_a_damaged_one(tmp_path: Path, read: Callable[[Path, str], object]) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "file", KIND)
    (tmp_path / "file").write_bytes(b"not ours")
    with pytest.raises(ArchiveError):
        read(tmp_path / "file", KIND)


def failing(error: BaseException, at_call: int = 1) -> Callable[..., None]:
    """Raises at this call and does nothing at any other."""
    calls = iter(range(1, 100))

    def act(*_: object, **__: object) -> None:
        if next(calls) == at_call:
            raise error

    return act


NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.parametrize("stage", ["fedkd_flwr.flower.archive.save_file", "os.fsync", "os.replace"])
def test_a_disk_that_refuses_leaves_the_old_file_and_no_litter(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(stage, failing(NO_SPACE))
        with pytest.raises(ArchiveError, match=r"file can't be written: .*No space left on device"):
            write_archive(path, KIND, Archive({"newer": True}))
    assert same(read_archive(path, KIND), SMALL)
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_really_full_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    with full_disk(), pytest.raises(ArchiveError, match="file can't be written"):
        write_archive(path, KIND, Archive({}, {"w": np.zeros(100_000)}))
    assert same(read_archive(path, KIND), SMALL)
    assert os.listdir(tmp_path) == ["file"]


MASKED = ()


@pytest.mark.parametrize("directory", ["/proc", "absent", pytest.param("/dev/null", marks=MASKED)])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, directory: str) -> None:
    with pytest.raises(ArchiveError, match="x can't be written"):
        write_archive(tmp_path / directory / "x", KIND, SMALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused_and_can_be_read(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArchiveError, match="file can't be written"):
            write_archive(path, KIND, Archive())
        assert same(read_archive(path, KIND), SMALL)
    finally:
        tmp_path.chmod(0o700)


def test_an_error_after_the_rename_leaves_the_new_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", failing(NO_SPACE, at_call=2))
        with pytest.raises(ArchiveError):
            write_archive(path, KIND, Archive({"newer": True}))
    assert read_archive(path, KIND).facts == {"newer": True}


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(archive_module, "make_durable", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_archive(path, KIND, Archive({"newer": True}))
    assert same(read_archive(path, KIND), SMALL)
    assert os.listdir(tmp_path) == ["file"]


def test_an_array_of_the_other_byte_order_is_read_back(tmp_path: Path) -> None:
    path = written(tmp_path / "file", Archive({}, {"w": np.arange(3, dtype=">f4")}))
    assert np.array_equal(read_archive(path, KIND).arrays["w"], np.arange(3))
