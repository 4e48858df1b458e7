"""Facts and arrays in one file that is replaced whole and refused when damaged.

The file is safetensors: arrays in its body, the facts as JSON in its header with a checksum over both. No pickle.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedkd_flwr.core.arrays import Array, Arrays

_FORMAT, _FACTS, _CHECKSUM = "format", "facts", "crc32"


class ArchiveError(Exception):
    """A file that can't be written, or is not what was written."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file holds.

    Attributes:
        facts: anything JSON can hold.
        arrays: by name.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


def write_archive(path: Path, kind: str, archive: Archive) -> None:
    """Replace a file by this archive; after a crash at any moment the old one or the new one is there, whole.

    Args:
        path: the file.
        kind: format and version; `read_archive` asks for the same.
        archive: what to write.

    Raises:
        ArchiveError: if the disk refuses. The old file is as it was.
    """
    facts = json.dumps(archive.facts)
    # ascontiguousarray gives a scalar an axis
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in archive.arrays.items()}
    header = {_FORMAT: kind, _FACTS: facts, _CHECKSUM: str(_checksum(facts, arrays))}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(arrays, partial, metadata=header)
        make_durable(partial)
        os.replace(partial, path)
        make_durable(path.parent)  # the rename itself
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ArchiveError(f"{path.name} can't be written: {error}") from error


def read_archive(path: Path, kind: str) -> Archive:
    """Read what `write_archive` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ArchiveError: if it is damaged or of another format.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = _header(file.metadata(), kind)
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
            facts = header[_FACTS]
        if int(header[_CHECKSUM]) != _checksum(facts, arrays):
            raise ArchiveError(f"{path.name} is damaged: its checksum differs")
        return Archive(json.loads(facts), arrays)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{path.name} is damaged: {error}") from error


def read_facts(path: Path, kind: str) -> dict[str, Any]:
    """The facts alone, without reading arrays or comparing the checksum. Raises as `read_archive` does."""
    try:
        with safe_open(path, framework="np") as file:
            facts: dict[str, Any] = json.loads(_header(file.metadata(), kind)[_FACTS])
            return facts
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{path.name} is damaged: {error}") from error


def make_durable(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(header: Mapping[str, str] | None, kind: str) -> Mapping[str, str]:
    found = (header or {}).get(_FORMAT)
    if header is None or found != kind:
        raise ArchiveError(f"format must be {kind!r}, got {found!r}")
    return header


def _checksum(facts: str, arrays: Mapping[str, Array]) -> int:
    checksum = zlib.crc32(facts.encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        checksum = zlib.crc32(f"{name}:{value.dtype.str}:{arrays[name].shape}".encode(), checksum)
        checksum = zlib.crc32(value.data.cast("B") if value.size else b"", checksum)
    return checksum
