"""Files and directories that are replaced whole, and directories of other libraries that can't be written.

A process that is killed while it writes leaves the file it found or the one it wrote, never a part of one.
"""

import ctypes
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0  # no file of a result takes as long to write
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux, <fcntl.h> and <linux/fs.h>
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR})
_PROBE_BYTES = 4096  # a full disk still makes empty files


class UnwritableError(ValueError):
    """A directory that a library needs can't be written; the message names it and the variable that moves it."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by one with this content, or make it; see `replacing`.

    Args:
        path: the file; its directory must exist.
        content: text is written as UTF-8.

    Raises:
        OSError: if the disk refuses. The file is as it was.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write into; it takes the place of `path` once it is written and on the disk.

    It has the suffix of `path`, by which libraries choose a format, and may be read by those who may read `path`.

    Raises:
        OSError: if the disk refuses. The file is as it was.
    """
    path = Path(os.path.realpath(path))  # a link to a file stays one
    _clear_abandoned(path)
    partial = _beside(path)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if path.exists():
            shutil.copymode(path, partial)
        yield partial
        make_durable(partial)
        os.replace(partial, path)
        make_durable(path.parent)
    except OSError as error:  # of a write, it does not say which file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_directory(directory: Path, write: Callable[[Path], object]) -> None:
    """Replace a directory by what `write` makes, in one step; where it makes nothing, there is none afterwards.

    Args:
        directory: made, with its parents, if it isn't there.
        write: called with the path of a directory beside it, which it makes and fills.

    Raises:
        OSError: if the disk refuses. The directory is as it was.
    """
    make_directory(directory.parent)
    _clear_abandoned(directory)
    partial = _beside(directory)
    try:
        write(partial)
        if partial.exists():
            for file in partial.rglob("*"):
                make_durable(file)
            make_durable(partial)
            _put_in_place(partial, directory)
        else:
            _remove(directory)
        make_durable(directory.parent)
    finally:
        _remove(partial)


def make_directory(directory: Path, mode: int = 0o777) -> None:
    """Make a directory and the parents it lacks, so that they are there after a power cut, too.

    Args:
        directory: that may be there already.
        mode: of the directory itself, less the umask; parents get the default.

    Raises:
        OSError: if it can't be made.
    """
    if directory.is_dir():
        return
    if directory.parent != directory:
        make_directory(directory.parent)
    try:
        directory.mkdir(mode=mode)
    except FileExistsError:
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None
    make_durable(directory.parent)


def make_durable(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk.

    Raises:
        OSError: if the disk refuses. A folder that may be written but not read is passed over.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems know no such thing
            raise
    finally:
        os.close(descriptor)


def refuse_unwritable(error: BaseException) -> None:
    """Do nothing, unless an error comes from a directory of the libraries that can't be written.

    Args:
        error: what a library raised while it loaded a data set, a model or a tokenizer, or drew.

    Raises:
        UnwritableError: naming the directory, the reason and the variable to set.
    """
    if reason := unwritable_place(error):
        raise UnwritableError(reason) from error


def unwritable_place(error: BaseException) -> str:
    """Which directory of the libraries an error comes from, in a sentence with the remedy; empty if from none.

    Libraries wrap such errors, and most of them then look as if the data or the model were at fault. So a directory is
    named only if an error in the chain is of that kind, and a try shows that it can't be written now.
    """
    if any(map(disk_refuses, _chain(error))):
        for directory, remedy in _places():
            if problem := write_problem(directory):
                return (
                    f"cache: {str(directory)!r} must be a directory that can be written, got: {problem}; "
                    f"set {remedy} to one that can"
                )
    return ""


def refusal(error: OSError) -> str:
    """What the disk refused, in one line with a remedy."""
    what = repr(error.filename) if error.filename else "a file"
    return unwritable_place(error) or (
        f"{what} can't be written: {error.strerror or error}; "
        "make room there, or choose another directory (--output-dir, TMPDIR, FLWR_HOME)"
    )


def write_problem(directory: Path) -> str:
    """Why a directory, or the nearest parent that exists, can't be written; empty if it can."""
    try:
        existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _places() -> Iterator[tuple[Path, str]]:
    """Each directory that a library writes, where its own variables put it, with those that move it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hugging_face = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    configuration = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    for variable, default, remedy in (
        ("HF_DATASETS_CACHE", os.path.join(hugging_face, "datasets"), "HF_HOME or HF_DATASETS_CACHE"),
        ("HF_HUB_CACHE", os.path.join(hugging_face, "hub"), "HF_HOME or HF_HUB_CACHE"),
        ("MPLCONFIGDIR", os.path.join(configuration, "matplotlib"), "MPLCONFIGDIR"),
    ):
        yield Path(os.path.abspath(os.path.expanduser(os.environ.get(variable) or default))), remedy


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def disk_refuses(error: BaseException) -> bool:
    """Whether an error says that something can't be written: no permission, no room, no directory."""
    # `datasets` raises one without a number.
    return isinstance(error, OSError) and (error.errno in _UNWRITABLE or "disk space" in str(error))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}{_PARTIAL}{path.suffix}")


def _clear_abandoned(path: Path) -> None:
    """Remove what a process that was killed has left beside a file."""
    for partial in path.parent.glob(f".{_literal(path.stem)}.*{_PARTIAL}{_literal(path.suffix)}"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                _remove(partial)


def _literal(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename a directory to where another one may be; that one is then at `partial`, if anywhere."""
    if not directory.exists():
        os.rename(partial, directory)
    elif not _exchanged(partial, directory):
        # In two steps where the system has no exchange; a kill between them leaves both, whole, under other names.
        aside = _beside(directory)
        os.rename(directory, aside)
        os.rename(partial, directory)
        _remove(aside)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two names of a directory were exchanged in one step; not every system and file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return rename is not None and rename(*names, _RENAME_EXCHANGE) == 0
