"""A Ray that serves one simulation and nobody else.

Ray listens on every interface of the machine, and runs what it is given by whoever finds its ports. With a token in
the environment of its processes, and only there, it refuses who has none. Its sockets and logs lie in a directory that
nobody else can enter and that ends with the run.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedkd_flwr.flower.errors import RunError

_MOST_SOCKET_BYTES = 103 if os.uname().sysname == "Darwin" else 107
# What Ray appends for its longest socket: "/ray/session_<date>_<time>_<microseconds>_<process>/sockets/plasma_store".
_APPENDED_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
MOST_DIRECTORY_BYTES = _MOST_SOCKET_BYTES - _APPENDED_BYTES
_SHORT = ("/tmp", "/var/tmp")
_TOKEN_BYTES = 32


@contextmanager
def private_ray(home: Path) -> Iterator[Mapping[str, str]]:
    """What the environment of a simulation's processes must have beyond that of others.

    Args:
        home: a private directory that ends with the run; Ray's is in it unless its path is too long for sockets.

    Yields:
        Environment variables. Ray's directory is there as long as the block lasts.

    Raises:
        RunError: if no directory with a path short enough can be made.
    """
    with _short_directory(home) as directory:
        yield {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(_TOKEN_BYTES),
            "RAY_TMPDIR": str(directory),
        }


@contextmanager
def _short_directory(home: Path) -> Iterator[Path]:
    if _fits(home):
        yield home
        return
    for parent in _SHORT:
        try:
            made = tempfile.TemporaryDirectory(prefix="fedkd-", dir=parent, ignore_cleanup_errors=True)
        except OSError:
            continue
        with made as name:
            if _fits(Path(name)):
                yield Path(name)
                return
    raise RunError(
        f"TMPDIR is too long for Ray's sockets ({_MOST_SOCKET_BYTES} bytes), and none of {', '.join(_SHORT)} can be "
        f"written: got {str(home.parent)!r}; set TMPDIR to a directory of at most "
        f"{MOST_DIRECTORY_BYTES - len(home.name) - 1} bytes"
    )


def _fits(directory: Path) -> bool:
    return len(os.fsencode(directory)) <= MOST_DIRECTORY_BYTES
